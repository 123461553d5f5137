"""Flags that `gpt2 sample`, `gpt2 chat` and `gpt2 serve` share: sampling settings, model, device, dtype, adapter."""

from argparse import Namespace
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gpt2.cli import Parser
from gpt2.errors import ConfigError, ModelFilesError, RequestError, did_you_mean
from gpt2.generation.defaults import MAX_NEW_TOKENS, TEMPERATURE, TOP_K

if TYPE_CHECKING:
    from gpt2.generation.engine import LanguageModel
    from gpt2.generation.sampling import Sampling
    from gpt2.model import GPT
    from gpt2.resolve import ResolvedModel
    from gpt2.tokenizer import Tokenizer

MODEL_HELP = "a run folder, a model folder, a checkpoint of another program (gpt2 convert --list), or a hub name"
DEVICE_HELP = "auto, cpu, cuda, cuda:N or mps [auto]"
NUMERIC_SETTINGS = {  # the sampling settings that are one number
    "temperature": "0 is greedy decoding",
    "top_k": "sample from the k most likely tokens; 0 for all",
    "top_p": "sample from the most likely tokens whose probabilities sum to p",
    "min_p": "sample from tokens at least p times as likely as the most likely one",
    "typical_p": "sample from the most typical tokens (surprise nearest the entropy) whose probabilities sum to p",
    "epsilon_cutoff": "sample from tokens of at least this probability",
    "eta_cutoff": "the same, with a cutoff that depends on the entropy",
    "repetition_penalty": "values over 1 make tokens of the prompt and the text less likely",
    "presence_penalty": "values over 0 make tokens of the generated text less likely",
    "frequency_penalty": "the same, times the number of occurrences",
    "no_repeat_ngram_size": "no n-gram of this size occurs twice; 0 for no such rule",
    "min_new_tokens": "no end of text before this many tokens",
}
SAMPLING_DEFAULTS = {  # those of `generation.text`, which imports torch
    "temperature": TEMPERATURE,
    "top_k": TOP_K,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "logit_bias": (),
    "bad_words": (),
    "min_new_tokens": 0,
}
PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int4")  # those of `generation.inference`, which imports torch


def add_sampling_flags(parser: Parser) -> None:
    """Add a flag for every field of `Sampling`, and for what ends a text. A number that is not given is None."""
    parser.section("sampling and length")
    parser.add_flag(
        "max-new-tokens", type=int, default=MAX_NEW_TOKENS, help=f"maximum length of each text [{MAX_NEW_TOKENS}]"
    )
    for name, description in NUMERIC_SETTINGS.items():
        default: Any = SAMPLING_DEFAULTS[name]
        parser.add_flag(name.replace("_", "-"), type=type(default), help=f"{description} [{default:g}]")
    for name, metavar, description in (
        ("logit-bias", "ID=BIAS", "add BIAS to the logit of a token; -inf excludes it"),
        ("bad-word", "TEXT", "never generate TEXT, with or without a leading space"),
        ("stop", "TEXT", "end the text before TEXT, which is not shown"),
    ):
        parser.add_flag(name, action="append", default=[], metavar=metavar, help=f"{description}; repeatable")
    parser.add_flag(
        "stop-escaped",
        action="append",
        dest="stop",
        type=unescape,
        metavar="TEXT",
        help="the same, with C escapes: --stop-escaped '\\n' is a newline",
    )
    parser.add_flag("seed", type=int, default=None, help="the same seed gives the same text; -1 for a random one")


def unescape(text: str) -> str:
    """`text` with C escapes such as ``\\n``, ``\\t`` and ``\\x41`` replaced. Raises ValueError for a broken one."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape")


def sampling_from_args(args: Namespace) -> "Sampling":
    """The flags as a `Sampling`, without the bad words, which need the tokenizer. Raises UserError for wrong values."""
    from gpt2.generation.sampling import Sampling
    from gpt2.generation.text import check_stop_strings

    check_stop_strings(args.stop)
    given = {name: getattr(args, name) for name in NUMERIC_SETTINGS}
    numbers: dict[str, Any] = {name: SAMPLING_DEFAULTS[name] if v is None else v for name, v in given.items()}
    return Sampling(**numbers, logit_bias=parse_logit_biases(args.logit_bias))


def parse_logit_biases(texts: Iterable[str]) -> tuple[tuple[int, float], ...]:
    """Parse ``["50256=-100"]`` into pairs of token id and bias."""
    pairs = []
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            pairs.append((int(token), float(bias)))
        except ValueError:
            message = f"logit-bias must be ID=BIAS, as 50256=-100, not {text}"
            raise RequestError(message, field="logit_bias") from None
    return tuple(pairs)


def encode_bad_words(tokenizer: "Tokenizer | None", texts: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Encode each text twice: without and with a leading space."""
    words = [text.removeprefix(" ") for text in texts]
    if not all(words):
        raise RequestError("a bad word must have at least one character besides a space", field="bad_words")
    if words and tokenizer is None:
        raise ModelFilesError("this model folder has no tokenizer: bad words need one")
    encoded = [tokenizer.encode(space + word) for word in words for space in ("", " ")] if tokenizer else []
    return tuple(dict.fromkeys(map(tuple, encoded)))


def add_model_flags(parser: Parser) -> None:
    """Add --device, --dtype and --adapter."""
    parser.section("model and device")
    parser.add_flag("device", default="auto", metavar="NAME", help=DEVICE_HELP)
    parser.add_flag(
        "dtype", default="float32", metavar="NAME", help=f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]} [float32]"
    )
    add_adapter_flag(parser)


def add_adapter_flag(parser: Parser) -> None:
    """Add --adapter."""
    parser.add_flag(
        "adapter",
        metavar="FOLDER",
        help="a LoRA adapter for MODEL, written by gpt2 finetune --lora-rank or PEFT: its folder, or the run's",
    )


def check_precision(name: str) -> None:
    """Raise UserError for a --dtype that is not one of PRECISIONS."""
    if name not in PRECISIONS:
        hint = did_you_mean(name, PRECISIONS)
        raise ConfigError(f"dtype '{name}' is not one of {', '.join(PRECISIONS)}{hint}", field="dtype")


def resolve_from_args(args: Namespace, ref: str, *, with_adapter: bool = True) -> "ResolvedModel":
    """Resolve a MODEL, with the adapter that the flags name. A draft model is used without it."""
    from gpt2.resolve import resolve_model

    check_precision(args.dtype)
    return resolve_model(ref, args.adapter if with_adapter else None)


def load_model(args: Namespace, model: "ResolvedModel") -> "tuple[GPT, Tokenizer | None]":
    """The plain torch model on --device, and its tokenizer."""
    import torch

    from gpt2.runtime import DTYPES, pick_device

    return model.load(device=pick_device(args.device), dtype=DTYPES.get(args.dtype, torch.float32))


def load_inference_model(args: Namespace, model: "ResolvedModel") -> "tuple[LanguageModel, Tokenizer | None]":
    """The fastest implementation of the model on --device in --dtype, and its tokenizer."""
    from gpt2.generation.inference import prepare_for_inference

    plain, tokenizer = load_model(args, model)
    return prepare_for_inference(plain, args.dtype), tokenizer
