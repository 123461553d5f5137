"""EleutherAI's lm-evaluation-harness on our server (`local-completions`) equals the same model in transformers.

Its requests are also sent by hand, for where the harness is not installed.
"""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
import gpt2
from tests.helpers.live_server import BYTE_TOKENIZER, CONFIG, LiveServer

pytest_plugins = "tests.helpers.server_fixtures"
CHOICES = [
    {"context": "The cat sat on the", "choices": ["mat", "moon", "Ünïcödé €", "dog house"], "gold": 0},
    {"context": 'It\'s "quoted" — yes', "choices": ["a", "five\nsix", "日本語", "🙂🙂"], "gold": 3},
    {"context": "long" + " long" * 30, "choices": ["a", "b c d e"], "gold": 1},
]
TEXTS = [{"text": "A short text."}, {"text": "naïve 🙂, until the context is passed; " * 9}, {"text": "x"}]
QUESTIONS = [{"question": "Once upon a time"}, {"question": "€ and ü"}]
WINDOW = CONFIG.block_size - 1  # prompt tokens: the harness requests one new token
NEW_TOKENS = 20


def pairs() -> list[tuple[list[int], list[int]]]:
    """Contexts and continuations as in the harness: the space is part of the choice; contexts are truncated left."""
    found = []
    for row in CHOICES:
        for choice in row["choices"]:
            more = BYTE_TOKENIZER.encode(f" {choice}")
            context = BYTE_TOKENIZER.encode(row["context"])
            found.append((context[-(WINDOW - len(more)) :], more))
    return found


def log_likelihood(server: LiveServer, context: list[int], more: list[int]) -> tuple[float, bool]:
    """By the model: the log-likelihood of the continuation, and whether it is the greedy one."""
    with torch.inference_mode():
        rows = server.model(torch.tensor([context + more]))[0].log_softmax(-1)[len(context) - 1 : -1]
    tokens = torch.tensor(more)
    return rows.gather(1, tokens[:, None]).sum().item(), bool((rows.argmax(-1) == tokens).all())


def greedy(server: LiveServer, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a KV cache."""
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(count):
            tokens = torch.cat([tokens, server.model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :].tolist()


def parse_like_the_harness(choice: dict[str, Any], context_length: int) -> tuple[float, bool]:
    """The log-likelihood of the tokens between the context and the new token, and whether each is the most likely."""
    logprobs = choice["logprobs"]
    own, top = (logprobs[name][context_length:-1] for name in ("token_logprobs", "top_logprobs"))
    return sum(own), all(logprob == max(likely.values()) for logprob, likely in zip(own, top, strict=True))


@pytest.mark.parametrize("form", ["one by one", "batch", "text"])
def test_the_log_likelihood_of_a_choice_is_that_of_the_model(
    server: LiveServer, client: httpx.Client, form: str
) -> None:
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    every = pairs()
    if form != "text":  # its tokens may have no text
        every.append((every[0][0], greedy(server, every[0][0], 3)))
    prompts: list[Any] = [context + more for context, more in every]
    sent = {
        "one by one": [[prompt] for prompt in prompts],
        "batch": [prompts[:5], prompts[5:]],
        "text": [BYTE_TOKENIZER.decode(prompt) for prompt in prompts],
    }[form]
    replies = [client.post("/v1/completions", json=asked | {"prompt": prompt}).json() for prompt in sent]
    choices = [choice for reply in replies for choice in sorted(reply["choices"], key=lambda choice: choice["index"])]
    found = [parse_like_the_harness(choice, len(context)) for choice, (context, _) in zip(choices, every, strict=True)]
    wanted = [log_likelihood(server, context, more) for context, more in every]
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in wanted], abs=1e-3)
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in wanted]
    assert form == "text" or wanted[-1][1]


def test_generation_ends_at_the_stop_strings_of_the_harness(server: LiveServer, client: httpx.Client) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": NEW_TOKENS, "temperature": 0, "seed": 1234}
    for row in QUESTIONS:
        prompt = BYTE_TOKENIZER.encode(row["question"])
        said = greedy(server, prompt, NEW_TOKENS)
        text = BYTE_TOKENIZER.decode(said)
        for until in (["\n\n", "<|endoftext|>"], [text[4:6], "<|endoftext|>"]):
            reply = client.post("/v1/completions", json=asked | {"prompt": [prompt], "stop": until}).json()
            end = min(at for at in (len(text), *map(text.find, until)) if at >= 0)
            assert reply["choices"][0]["text"] == text[:end]


CHOOSE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
READ = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity"}],
}
WRITE = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "x",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
TASKS = {"choices": (CHOICES, CHOOSE), "texts": (TEXTS, READ), "questions": (QUESTIONS, WRITE)}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with the three tasks and their rows."""
    for name, (rows, task) in TASKS.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(source | {"test_split": "test"} | task))
    return tmp_path


def test_harness_results_equal_those_with_transformers(
    server: LiveServer, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracies and perplexity, and each answer: log-likelihood, whether it is greedy, text."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tasks / "hf"))
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    pytest.importorskip("tenacity", reason="lm-evaluation-harness is not installed with [api]")
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    folder = str(gpt2.save(server.model, BYTE_TOKENIZER, tasks / "tiny"))
    found = TaskManager(include_path=str(tasks), include_defaults=False)

    def evaluate(kind: str, **given: Any) -> Any:
        options: Any = {"tasks": list(TASKS), "task_manager": found, "bootstrap_iters": 0, "device": "cpu"}
        return lm_eval.simple_evaluate(model=kind, model_args=given, log_samples=True, **options)

    theirs = evaluate("hf", pretrained=folder, dtype="float32", max_length=WINDOW - 1)
    address, size = f"{server.url}/v1/completions", CONFIG.block_size
    for how in ({}, {"batch_size": 3}, {"num_concurrent": 4}):
        ours = evaluate("local-completions", model="tiny", base_url=address, tokenizer=folder, max_length=size, **how)
        for task, metric in (("choices", "acc"), ("choices", "acc_norm"), ("texts", "byte_perplexity")):
            value = theirs["results"][task][f"{metric},none"]
            assert ours["results"][task][f"{metric},none"] == pytest.approx(value, rel=1e-4)
        for task in TASKS:
            assert answers(ours, task) == pytest.approx(answers(theirs, task), abs=1e-3)


def answers(evaluated: Any, task: str) -> list[float]:
    """The results of all rows as numbers: log-likelihoods, 1 for greedy, the characters of a text."""
    samples = sorted(evaluated["samples"][task], key=lambda sample: sample["doc_id"])
    said = [answer for sample in samples for answer in sample["filtered_resps"]]
    if task == "questions":
        return [ord(character) for text in said for character in text]
    if task == "texts":
        return [float(answer) for answer in said]
    return [value for logprob, likeliest in said for value in (float(logprob), float(str(likeliest) == "True"))]
