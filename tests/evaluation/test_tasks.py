"""Rows in every form that publishers and the hub have, and the numbers that follow from what was scored."""

import gzip
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2.errors import UserError
from gpt2.evaluation import formats
from gpt2.evaluation.choices import Choices, prepare_choices, prepare_completion
from gpt2.evaluation.evaluate import Interrupted, evaluate_tasks, prepare_task, run_parts, task_names
from gpt2.evaluation.lambada import Passage, prepare_lambada
from gpt2.evaluation.measures import exp_of, mean_and_stderr, ratio_and_stderr
from gpt2.evaluation.perplexity import Text, harness_units, prepare_rolling, word_units
from gpt2.evaluation.prepare import Part
from gpt2.evaluation.scorer import Scored
from gpt2.evaluation.share import Share
from gpt2.evaluation.tasks import SETS, TASKS
from gpt2.model import GPT
from gpt2.tokenizer import BPETokenizer
from tests.evaluation.task_rows import EVAL_DATA, publisher_rows, write_rows

ROW: dict[str, dict[str, Any]] = {
    "hellaswag": {
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he",
        "endings": ["is using wrap [title] now.", "is ripping [step] tiles off."],
        "label": "1",
    },
    "piqa": {"goal": "dresser", "sol1": "a bobby pin", "sol2": "a drawer", "label": 1},
    "arc-easy": {
        "question": "Which one?",
        "choices": {"text": ["goggles", "masks"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "openbookqa": {
        "id": "1",
        "question": {
            "stem": "Fog is around",
            "choices": [{"text": "a marsh", "label": "A"}, {"text": "a desert", "label": "B"}],
        },
        "answerKey": "B",
    },
    "winogrande": {
        "sentence": "Sarah was better than Maria so _ always won.",
        "option1": "Sarah",
        "option2": "Maria",
        "answer": "2",
    },
    "wsc273": {
        "text": "The trophy doesn't fit into the suitcase because it is too large.",
        "pronoun": "it",
        "pronoun_loc": 49,
        "options": ["The suitcase", "The trophy"],
        "label": 1,
    },
    "copa": {
        "premise": "The man turned on the faucet.",
        "choice1": "It rained.",
        "choice2": "Water flowed.",
        "question": "effect",
        "label": 1,
    },
    "boolq": {"passage": "Fog is wet.", "question": "is fog wet", "label": 1},
    "sciq": {
        "support": "",
        "question": "What?",
        "distractor1": "a",
        "distractor2": "b",
        "distractor3": "c",
        "correct_answer": "d",
    },
    "cbt-cn": {
        "sentences": ["`` Well , '' said he .", "They did n't go ."],
        "question": "He saw the XXXXX there .",
        "answer": "dog",
        "options": ["cat", "dog"],
    },
}


@pytest.mark.parametrize(
    ("task", "context", "continuation"),
    [
        ("hellaswag", "Roof shingle removal: A man is sitting on a roof. He", " is ripping tiles off."),
        ("piqa", "Question: dresser\nAnswer:", " a drawer"),
        ("arc-easy", "Question: Which one?\nAnswer:", " masks"),
        ("openbookqa", "Fog is around", " a desert"),
        ("winogrande", "Sarah was better than Maria so Maria", " always won."),
        ("wsc273", "The trophy doesn't fit into the suitcase because the trophy", "  is too large."),
        ("copa", "The man turned on the faucet therefore", "  water flowed."),
        ("boolq", "Fog is wet.\nQuestion: is fog wet?\nAnswer:", " yes"),
        ("sciq", "\nQuestion: What?\nAnswer:", " d"),
        ("cbt-cn", '"Well," said he. They didn\'t go. He saw the', " dog there."),
    ],
)
def test_the_right_choice_of_a_published_row(task: str, context: str, continuation: str) -> None:
    read = TASKS[task].read
    assert callable(read)
    row: Choices = read(("rows line 1", ROW[task]))
    assert (row.contexts[row.gold], row.continuations[row.gold]) == (context, continuation)
    if TASKS[task].normalized:
        assert row.sizes[row.gold] == len(continuation) - 1  # characters without the delimiter


def test_completion_takes_the_texts_as_they_are() -> None:
    row = formats.hellaswag_completion(("rows line 1", ROW["hellaswag"]))
    assert row.contexts[0] == "A man is sitting on a roof. he"
    assert row.continuations[0] == " is using wrap [title] now."


@pytest.mark.parametrize("task", ["piqa", "arc-easy", "arc-challenge", "openbookqa", "winogrande", "hellaswag"])
def test_the_files_of_llm_foundry_give_what_the_publishers_do(task: str) -> None:
    if not EVAL_DATA.is_dir():
        pytest.skip(f"no {EVAL_DATA}")
    name = {"openbookqa": "openbook_qa"}.get(task, task.replace("-", "_"))
    path = EVAL_DATA / "multiple-choice" / f"{name}.jsonl.gz"
    path = EVAL_DATA / "hellaswag" / "hellaswag_val.jsonl.gz" if task == "hellaswag" else path
    read = TASKS[task].read
    assert callable(read)
    with gzip.open(path, "rt") as file:
        for number, (line, published) in enumerate(zip(file, publisher_rows(EVAL_DATA, task), strict=False)):
            if number == 100:
                break
            assert read(("", json.loads(line))) == read(("", published))


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("piqa", {"sol1": None}, "rows line 7 has no 'sol1'"),
        ("piqa", {"label": 2}, "rows line 7: 'label' must be a whole number from 0 to 1, not 2"),
        ("hellaswag", {"endings": "one"}, "rows line 7: 'endings' must be a list of two texts or more"),
        ("arc-easy", {"answerKey": "E"}, "rows line 7: the answerKey 'E' is not one of its labels: A, B"),
        ("winogrande", {"sentence": "no blank"}, "rows line 7: the sentence has no blank '_'"),
        ("boolq", {"passage": 5}, "rows line 7: 'passage' is a number, not text"),
        ("cbt-cn", {"answer": "cow"}, "rows line 7: the answer 'cow' is not one of the options"),
    ],
)
def test_a_wrong_row_is_one_line(task: str, change: dict[str, Any], message: str) -> None:
    read = TASKS[task].read
    assert callable(read)
    with pytest.raises(UserError) as caught:
        read(("rows line 7", ROW[task] | change))
    assert str(caught.value) == message


def scored(*totals: float) -> list[Scored]:
    return [Scored(np.array([total], np.float32), np.array([False])) for total in totals]


def choices(gold: int = 1) -> Choices:
    return Choices(("the dog",) * 3, (" runs", " sleeps in", " is"), gold, (4, 9, 2), "line 1")


def test_a_tie_goes_to_the_first_choice(model: GPT, words: BPETokenizer) -> None:
    prepared = prepare_choices([choices(gold=0), choices(gold=1)], words, model.config)
    assert prepared.record(0, scored(-5, -5, -6))[0] == 1.0
    assert prepared.record(1, scored(-5, -5, -6))[0] == 0.0


def test_acc_norm_divides_by_characters(model: GPT, words: BPETokenizer) -> None:
    prepared = prepare_choices([choices(gold=1)], words, model.config)
    assert prepared.record(0, scored(-5, -6, -4))[:2] == (0.0, 1.0)


def test_completion_divides_by_tokens(model: GPT, words: BPETokenizer) -> None:
    prepared = prepare_completion([choices(gold=1)], words, model.config)
    long = Scored(np.array([-2.0, -2.0, -2.0], np.float32), np.zeros(3, dtype=bool))
    acc, acc_norm, loss, *sums = prepared.record(0, [*scored(-5), long, *scored(-4)])
    assert (acc, acc_norm, loss) == (0.0, 1.0, 2.0)
    assert sums == [5.0, 6.0, 4.0]


def test_lambada_counts_all_tokens_of_the_word_or_the_last(model: GPT, words: BPETokenizer) -> None:
    prepared = prepare_lambada([Passage("the dog sleeps", "line 1")], words, model.config)
    half = Scored(np.array([-1.0, -2.0], np.float32), np.array([False, True]))
    assert prepared.record(0, [half]) == (0.0, 1.0, -3.0)
    found = prepared.summarize({0: (1.0, 1.0, -3.0), 1: (0.0, 1.0, -1.0)})
    assert found.metrics == {"acc": 0.5, "acc_last_token": 1.0, "perplexity": pytest.approx(math.exp(2))}
    with pytest.raises(UserError, match="line 9: the text has no last word"):
        prepare_lambada([Passage("one", "line 9")], words, model.config)


def test_standard_errors() -> None:
    assert mean_and_stderr([1, 0, 1, 1]) == (0.75, pytest.approx(0.25))
    assert mean_and_stderr([1]) == (1.0, None)
    assert exp_of(800, 1.0)[0] == math.inf
    ratio, stderr = ratio_and_stderr([2.0, 4.0], [1, 2])  # no spread around the ratio
    assert (ratio, stderr) == (2.0, 0.0)


def test_perplexities_of_the_same_loss_in_other_units(model: GPT, words: BPETokenizer) -> None:
    text = Text("the dog runs", "the dog runs .", "a text")
    units = word_units([text])
    assert (units.words, units.bytes, units.characters) == (4, 14, 14)
    result = run_parts([Part(prepare_rolling([text], words, model.config, units))], model, "p")
    tokens = len(words.encode(text.scored))
    total = result.metrics["loss"] * tokens
    assert result.metrics["token_perplexity"] == pytest.approx(math.exp(total / tokens))
    assert result.metrics["word_perplexity"] == pytest.approx(math.exp(total / 4))
    assert result.metrics["byte_perplexity"] == pytest.approx(math.exp(total / 14))
    assert result.metrics["bits_per_byte"] == pytest.approx(total / 14 / math.log(2))
    assert harness_units([Text.plain(" a b\n", "")]).words == 4  # the empty ones at either end count


def test_one_token_and_long_documents(model: GPT, words: BPETokenizer) -> None:
    one = prepare_rolling([Text.plain("t", "one")], words, model.config, word_units([Text.plain("t", "")]))
    assert [query.tokens[0] for (query,) in one.groups] == [words.end_of_text]
    long = Text.plain("the dog sleeps " * 60, "long")
    prepared = prepare_rolling([long], words, model.config, word_units([long]), stride=10)
    assert len(prepared.groups) > 5
    assert run_parts([Part(prepared)], model, "p").rows == 1
    with pytest.raises(UserError, match="nothing to score"):
        prepare_rolling([Text.plain("", "empty.txt")], words, model.config, word_units([]))
    with pytest.raises(UserError, match="--stride must be between 1 and the model's context of 48, not 49"):
        prepare_rolling([long], words, model.config, word_units([long]), stride=49)


def test_the_fingerprint_is_of_the_rows_not_of_the_file(model: GPT, words: BPETokenizer, tmp_path: Path) -> None:
    plain, packed = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz"
    lines = [json.dumps({"text": f"the dog runs to the {word}"}) for word in ("sea", "man", "river")]
    plain.write_text("\n".join(lines))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    first = evaluate_tasks(model, words, ["lambada"], task_data={"lambada": str(plain)})["lambada"]
    second = evaluate_tasks(model, words, ["lambada"], task_data={"lambada": str(packed)})["lambada"]
    limited = evaluate_tasks(model, words, ["lambada"], 2, task_data={"lambada": str(plain)})["lambada"]
    assert first == second
    assert limited.data != first.data
    assert (first.rows, limited.rows) == (3, 2)


def test_ranks_share_the_rows_and_agree(model: GPT, words: BPETokenizer) -> None:
    rows = [Choices((f"the dog {i}",) * 2, (" runs", " sleeps"), i % 2, (4, 6), f"line {i}") for i in range(150)]
    parts = [Part(prepare_choices(rows, words, model.config))]
    alone = run_parts(parts, model, "p")
    barrier, values, results = threading.Barrier(3), [None] * 3, {}

    def rank(number: int) -> None:
        def all_gather(value: Any) -> list[Any]:
            values[number] = value
            barrier.wait()
            return list(values)

        results[number] = run_parts(parts, model, "p", share=Share(number, 3, all_gather))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[number] == alone for number in range(3))


def test_ctrl_c_keeps_what_is_known(model: GPT, words: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("gpt2.evaluation.scorer").evaluation.scorer.BATCH_TOKENS, "cpu", 16)
    rows = [Choices((f"the dog {i}",) * 2, (" runs", " sleeps"), i % 2, (4, 6), f"line {i}") for i in range(20)]
    calls = []

    def progress(done: int, total: int, so_far: Any) -> None:
        calls.append((done, total))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        run_parts([Part(prepare_choices(rows, words, model.config))], model, "p", progress=progress)
    result = caught.value.result
    assert result is not None
    assert not result.complete
    assert result.rows == calls[-1][0] < 20
    assert set(result.metrics) == {"acc", "acc_norm"}


def test_task_names() -> None:
    assert task_names(["default", "lambada"]) == list(SETS["default"])
    assert {name for names in SETS.values() for name in names} <= TASKS.keys()
    with pytest.raises(UserError, match=r"there is no task 'helaswag' \(did you mean 'hellaswag'\?\)"):
        task_names(["helaswag"])


def test_wikitext_by_two_protocols(model: GPT, words: BPETokenizer, tmp_path: Path) -> None:
    raw = tmp_path / "wiki.raw"
    raw.write_text(" \n = One = \n \n the dog , the man . \n \n = Two = \n \n the sea @-@ side . \n \n")
    names = ["wikitext2", "wikitext2-harness", "wikitext2-raw", "wikitext2-paper"]
    found = evaluate_tasks(model, words, names, task_data=dict.fromkeys(names, str(raw)))
    both = found["wikitext2"].metrics
    assert all(result.rows == 2 for result in found.values())
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert both[metric] == found["wikitext2-harness"].metrics[metric]
    assert both["token_perplexity"] == found["wikitext2-raw"].metrics["token_perplexity"]
    (part,) = prepare_task(TASKS["wikitext2-paper"], words, model, task_data={"wikitext2-paper": str(raw)})
    assert part.prepared.content[0][0].splitlines()[-2:] == ["the sea-side.", " "]


def test_the_guides_stream_has_its_tokens(gpt2_vocabulary: None) -> None:
    from gpt2.evaluation.texts import guide_text, wikitext_pages, wikitext_text
    from gpt2.tokenizer import get_tokenizer

    path = EVAL_DATA / "wikitext" / "wiki.test.raw"
    if not path.is_file():
        pytest.skip(f"no {path}")
    content = path.read_bytes()
    assert len(wikitext_pages(content, "")) == 62
    # what transformers says when its guide tokenizes the test set: 287644 > 1024
    assert len(get_tokenizer("gpt2").encode(guide_text(wikitext_text(content, "")))) == 287644


def test_every_task_with_real_data_runs(model: GPT, words: BPETokenizer, tmp_path: Path) -> None:
    if not EVAL_DATA.is_dir():
        pytest.skip(f"no {EVAL_DATA}")
    from dataclasses import replace

    wide = GPT(replace(model.config, block_size=640)).eval()
    for task in ("piqa", "arc-challenge", "winogrande", "lambada"):
        rows = write_rows(EVAL_DATA, task, 8, tmp_path / f"{task}.jsonl")
        found = evaluate_tasks(wide, words, [task], task_data={task: str(rows)})[task]
        assert found.rows == 8
        assert 0 <= found.metrics["acc"] <= 1
