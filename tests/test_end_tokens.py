"""Every id that a model folder names in `eos_token_id` ends a text, is not shown, and survives load and save."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt2
from gpt2.errors import UserError
from gpt2.generation.beam_search import beam_search_texts
from gpt2.generation.chat import Conversation
from gpt2.generation.contrastive_search import contrastive_stream
from gpt2.generation.engine import GenerationRequest, SampledToken, Sequence
from gpt2.generation.sampling import Sampling
from gpt2.generation.speculative import PromptLookup, speculate
from gpt2.model import GPT, GPTConfig
from gpt2.serve.choices import Choice
from gpt2.templates import get_template
from gpt2.tokenizer import Tokenizer, get_tokenizer, load_tokenizer, with_special_tokens

A, Z, END = ord("A"), ord("Z"), 256
ALWAYS_A = Sampling(temperature=0, logit_bias=((A, 1000.0),))


def save_model(folder: Path, config: Any = None, generation_config: Any = None) -> Path:
    """A model folder over bytes, with these values of `eos_token_id` in its configs; None to leave a file as it is."""
    torch.manual_seed(0)
    gpt2.save(GPT(GPTConfig(300, 64, 1, 2, 16)), get_tokenizer("bytes"), folder)
    for name, value in (("config.json", config), ("generation_config.json", generation_config)):
        path = folder / name
        values = json.loads(path.read_text())
        del values["eos_token_id"]
        path.write_text(json.dumps(values if value is None else values | {"eos_token_id": value}))
    return folder


def load_model(folder: Path) -> tuple[GPT, Tokenizer]:
    model, tokenizer = gpt2.load(folder)
    assert tokenizer is not None
    return model, tokenizer


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        (None, None, (END,)),
        (A, None, (A,)),
        (None, A, (A,)),
        ([A, END], None, (A, END)),
        (A, [END, Z], (A, END, Z)),
        (50256, None, (END,)),  # a default that is outside this vocabulary
    ],
)
def test_ids_of_both_configs_are_read_and_survive_load_and_save(
    config: Any, generation_config: Any, expected: tuple[int, ...], tmp_path: Path
) -> None:
    model, tokenizer = load_model(save_model(tmp_path / "given", config, generation_config))
    assert tokenizer.end_tokens == expected
    gpt2.save(model, tokenizer, tmp_path / "saved")
    assert load_model(tmp_path / "saved")[1].end_tokens == expected


@pytest.mark.parametrize("value", ["</s>", [1, "2"], -1, True, {"id": 3}])
def test_an_eos_token_id_that_is_no_id_is_one_line(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="eos_token_id must be a token id or a list of them"):
        gpt2.load(save_model(tmp_path / "m", generation_config=value))


def test_extended_tokenizers_keep_the_end_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_model(tmp_path / "m", [A, END]))
    assert tokenizer is not None
    assert with_special_tokens(tokenizer, ["<|user|>"]).end_tokens == (A, END)


def test_every_decoder_ends_there_and_does_not_show_it(tmp_path: Path) -> None:
    model, tokenizer = load_model(save_model(tmp_path / "m", generation_config=[Z, A]))
    limits: dict[str, Any] = {"max_new_tokens": 4}
    assert gpt2.generate(model, tokenizer, "x", **limits, temperature=0, logit_bias=ALWAYS_A.logit_bias) == ["x"]
    assert beam_search_texts(model, tokenizer, "x", num_beams=1, sampling=ALWAYS_A, **limits) == ["x"]
    assert "".join(contrastive_stream(model, tokenizer, "x", sampling=ALWAYS_A, **limits)) == ""
    assert "".join(speculate(model, tokenizer, "x", PromptLookup(2), ALWAYS_A, **limits)) == ""
    talk = Conversation(model, tokenizer, ALWAYS_A, max_new_tokens=4)
    assert "".join(talk.send("x")) == ""
    assert talk.turns[0].tokens == []


def choice_of(tokenizer: Tokenizer, tokens: list[int], *stop: str, **settings: Any) -> Choice:
    """A choice of the server after these tokens; "length" unless one of them ended it."""
    choice, sequence = Choice(0, tokenizer, stop, **settings), Sequence(GenerationRequest([0]))
    for token in tokens:
        if choice.finish_reason is None:
            choice.push(SampledToken(sequence, token, -1.0))
    if choice.finish_reason is None:
        choice.finish()
    return choice


def test_the_server_ends_there_and_does_not_show_it(tmp_path: Path) -> None:
    tokenizer = load_model(save_model(tmp_path / "m", generation_config=[Z, A]))[1]
    choice = choice_of(tokenizer, [ord("x"), A, ord("y")])
    assert (choice.text, choice.finish_reason) == ("x", "stop")


def test_transformers_ends_an_answer_of_the_template(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    template = get_template("chatml")
    tokenizer = with_special_tokens(get_tokenizer("bytes"), template.special_tokens)
    end = tokenizer.special_tokens["<|im_end|>"]
    torch.manual_seed(0)
    gpt2.save(GPT(GPTConfig(tokenizer.vocab_size, 64, 1, 2, 16)), tokenizer, tmp_path / "m", template=template)
    theirs: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "m")
    assert theirs.generation_config.eos_token_id == [END, end]
    biased = {"sequence_bias": {(end,): 1000.0}, "do_sample": False, "pad_token_id": 0}
    assert theirs.generate(torch.tensor([[1]]), max_new_tokens=5, **biased)[0].tolist() == [1, end]
    assert load_model(tmp_path / "m")[1].end_tokens == (END, end)


def test_special_tokens_are_hidden_unless_asked_for() -> None:
    tokenizer = with_special_tokens(get_tokenizer("bytes"), ["<pad>"])
    pad = tokenizer.special_tokens["<pad>"]
    model = GPT(GPTConfig(tokenizer.vocab_size, 64, 1, 2, 16))
    biased = {"max_new_tokens": 2, "temperature": 0, "logit_bias": ((pad, 1000.0),)}
    assert gpt2.generate(model, tokenizer, "x", **biased) == ["x"]
    assert gpt2.generate(model, tokenizer, "x", **biased, skip_special_tokens=False) == ["x<pad><pad>"]
    tokens = [ord("a"), pad, ord("b")]
    assert choice_of(tokenizer, tokens).text == "ab"
    assert [one.offset for one in choice_of(tokenizer, tokens).token_logprobs] == [0, 1, 1]
    assert choice_of(tokenizer, tokens, skip_special_tokens=False).text == "a<pad>b"


@pytest.mark.parametrize("stop", ["<pad>", "a<pad>", "ad"])
def test_a_stop_string_in_a_hidden_token_ends_the_text(stop: str) -> None:
    tokenizer = with_special_tokens(get_tokenizer("bytes"), ["<pad>"])
    choice = choice_of(tokenizer, [ord("x"), ord("a"), tokenizer.special_tokens["<pad>"], ord("b")], stop)
    assert (choice.text, choice.finish_reason) == ("x" if stop == "a<pad>" else "xa", "stop")


def test_min_tokens_holds_back_stop_strings() -> None:
    choice = choice_of(get_tokenizer("bytes"), list(b"aXbXc"), "X", min_tokens=2)
    assert (choice.text, choice.finish_reason) == ("aXb", "stop")


def test_an_incomplete_character_at_the_length_limit_is_dropped() -> None:
    assert choice_of(get_tokenizer("bytes"), [*b"ab", 0xE2, 0x82]).text == "ab"


def test_the_offset_after_a_broken_character_counts_its_replacement() -> None:
    choice = choice_of(get_tokenizer("bytes"), [0xE2, 0x82, *b"ab"])
    assert choice.text == "\ufffdab"
    assert [one.offset for one in choice.token_logprobs] == [0, 0, 1, 2]


def test_seed_minus_one_is_a_random_seed() -> None:
    torch.manual_seed(0)
    model, tokenizer = GPT(GPTConfig(257, 64, 1, 2, 16)), get_tokenizer("bytes")
    texts = {gpt2.generate(model, tokenizer, "x", max_new_tokens=40, seed=-1)[0] for _ in range(3)}
    assert len(texts) == 3
    assert Conversation(model, tokenizer, seed=-1).seed != -1
