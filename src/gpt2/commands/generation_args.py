"""What `gpt2 sample` and `gpt2 chat` have in common: flags for how text is made, and the model that makes it."""

import re
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TextIO

import torch

from gpt2.cli import Parser
from gpt2.errors import UserError, did_you_mean
from gpt2.generation.engine import LanguageModel
from gpt2.generation.inference import PRECISIONS, prepare_for_inference
from gpt2.generation.sampling import Sampling
from gpt2.generation.text import check_stop_strings
from gpt2.lora import find_adapter
from gpt2.model import GPT
from gpt2.runtime import DTYPES, pick_device
from gpt2.templates import ChatTemplate, load_template
from gpt2.tokenizer import Tokenizer
from gpt2.weights import find_model_folder, load

NUMERIC_SETTINGS = {  # the settings that are one number, and what they do
    "temperature": "0 takes the most likely token, always",
    "top_k": "choose among the k most likely; 0 for all",
    "top_p": "choose among the most likely that sum to p",
    "min_p": "choose among those at least p times as likely as the most likely",
    "typical_p": "choose among those of the most expected surprise, until they sum to p",
    "epsilon_cutoff": "choose among those of at least this probability",
    "eta_cutoff": "the same, with a cut that follows the entropy",
    "repetition_penalty": "over 1 makes what was said less likely, prompt included",
    "presence_penalty": "over 0 makes what was said less likely, prompt not included",
    "frequency_penalty": "the same, for each time it was said",
    "no_repeat_ngram_size": "no run of so many tokens twice; 0 for no such rule",
    "min_new_tokens": "no end of text before so many",
}
SAMPLING_DEFAULTS = {field.name: field.default for field in fields(Sampling)} | {"top_k": 50}
UNSAFE_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def add_sampling_flags(parser: Parser, max_new_tokens: int) -> None:
    """Every field of `Sampling`, and what ends a text. A number that is not given is None, and means its default."""
    parser.add_flag(
        "max-new-tokens", type=int, default=max_new_tokens, help=f"length of each at most [{max_new_tokens}]"
    )
    for name, about in NUMERIC_SETTINGS.items():
        default: Any = SAMPLING_DEFAULTS[name]
        parser.add_flag(name.replace("_", "-"), type=type(default), help=f"{about} [{default:g}]")
    parser.add_flag(
        "logit-bias",
        action="append",
        default=[],
        metavar="ID=BIAS",
        help="add to the logit of a token, -inf to rule it out; may be given several times",
    )
    parser.add_flag(
        "bad-word",
        action="append",
        default=[],
        metavar="TEXT",
        help="never say it, with or without a space before it; may be given several times",
    )
    parser.add_flag(
        "stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text (not shown); may be given several times",
    )
    parser.add_flag("seed", type=int, default=None, help="the same seed, the same text")


def sampling_from_args(args: Namespace) -> Sampling:
    """The flags as a `Sampling`, less the bad words, which need the tokenizer. Raises UserError for impossible ones."""
    check_stop_strings(args.stop)
    return Sampling(
        **{name: number_from_args(args, name) for name in NUMERIC_SETTINGS},
        logit_bias=parse_logit_biases(args.logit_bias),
    )


def number_from_args(args: Namespace, name: str) -> Any:
    """What was given for one of NUMBERS, or its default."""
    given = getattr(args, name)
    return SAMPLING_DEFAULTS[name] if given is None else given


def parse_logit_biases(texts: Iterable[str]) -> tuple[tuple[int, float], ...]:
    """``["50256=-100"]`` as pairs of id and bias."""
    pairs = []
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            pairs.append((int(token), float(bias)))
        except ValueError:
            raise UserError(f"logit-bias must be ID=BIAS, as 50256=-100, not {text}") from None
    return tuple(pairs)


def encode_bad_words(tokenizer: Tokenizer | None, texts: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Each text as the tokens it begins a text with, and as those it has after a space."""
    words = [text.removeprefix(" ") for text in texts]
    if not all(words):
        raise UserError("a bad word must have at least one character besides a space")
    if words and tokenizer is None:
        raise UserError("this model folder has no tokenizer: bad words need one")
    spelled = [tokenizer.encode(space + word) for word in words for space in ("", " ")] if tokenizer else []
    return tuple(dict.fromkeys(map(tuple, spelled)))


def add_model_flags(parser: Parser) -> None:
    """Where the model runs, how precisely, and with which adapter."""
    parser.add_flag("device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    parser.add_flag("dtype", default="float32", help=f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]} [float32]")
    add_adapter_flag(parser)


def add_adapter_flag(parser: Parser) -> None:
    """What MODEL was taught beside its weights."""
    parser.add_flag(
        "adapter",
        metavar="FOLDER",
        help="a LoRA adapter for MODEL, as gpt2 finetune --lora-rank or PEFT writes it: its folder, or the run's",
    )


def load_inference_model(
    args: Namespace, model: str, *, with_adapter: bool = True
) -> tuple[LanguageModel, Tokenizer | None]:
    """A model as fast as it runs on the device and in the precision that the flags ask for, and its tokenizer.

    adapted: with the adapter that they name; a draft does without.
    """
    plain, tokenizer = load_model(args, model, with_adapter=with_adapter)
    return prepare_for_inference(plain, args.dtype), tokenizer


def load_model(args: Namespace, model: str, *, with_adapter: bool = True) -> tuple[GPT, Tokenizer | None]:
    """The same before it is made fast: what can be looked into."""
    if args.dtype not in PRECISIONS:
        hint = did_you_mean(args.dtype, PRECISIONS)
        raise UserError(f"dtype '{args.dtype}' is not one of {', '.join(PRECISIONS)}{hint}")
    dtype = DTYPES.get(args.dtype, torch.float32)
    adapter = args.adapter if with_adapter else None
    return load(model, device=pick_device(args.device), dtype=dtype, adapter=adapter)


def template_from_args(args: Namespace, model: str) -> ChatTemplate | None:
    """How the model writes a conversation: as its adapter says, or its own folder; None where neither does."""
    own = load_template(find_adapter(args.adapter)) if args.adapter else None
    return own or load_template(find_model_folder(model))


def escape_for_terminal(text: str, stream: TextIO | None) -> str:
    """`text` as it may be written to `out`: a terminal gets nothing that it could obey, anything else gets it as it is.

    What could move a cursor, colour a screen or turn text around becomes an escape; new lines and tabs may pass.
    """
    if stream is None or not stream.isatty():
        return text
    return UNSAFE_CHARACTERS.sub(lambda match: ascii(match[0])[1:-1], text)
