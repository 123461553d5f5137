"""Text in, text out: what a prompt becomes, whole or as it comes."""

import secrets
from collections import abc
from collections.abc import Iterator
from typing import Any, overload

from gpt2.errors import UserError, did_you_mean
from gpt2.generation.engine import Engine, GenerationRequest, LanguageModel, Sequence
from gpt2.generation.inference import prepare_for_inference
from gpt2.generation.sampling import Sampling
from gpt2.tokenizer import StreamDecoder, Tokenizer

MAX_SAMPLES = 10_000  # of one prompt
MAX_BATCH_SIZE = 64  # so many samples are made at a time; the others follow as these finish


@overload
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    prompt: str,
    *,
    num_samples: int = 1,
    max_new_tokens: int = 100,
    stop: abc.Sequence[str] = (),
    seed: int | None = None,
    **settings: Any,
) -> list[str]: ...


@overload
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    prompt: list[str] | tuple[str, ...],
    *,
    num_samples: int = 1,
    max_new_tokens: int = 100,
    stop: abc.Sequence[str] = (),
    seed: int | None = None,
    **settings: Any,
) -> list[list[str]]: ...


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    prompt: str | list[str] | tuple[str, ...],
    *,
    num_samples: int = 1,
    max_new_tokens: int = 100,
    stop: abc.Sequence[str] = (),
    seed: int | None = None,
    **settings: Any,
) -> list[str] | list[list[str]]:
    """Continue `prompt` in `num_samples` ways. Returns the texts, prompt included; a list for each of several prompts.

        texts = gpt2.generate(model, tokenizer, "Hello", num_samples=5, temperature=0.8, top_k=50, seed=42)

    stop:     a text ends before the first of these strings.
    seed:     the same seed gives the same texts; None draws a new one. Sample i of a prompt is the same for any
              `num_samples` > i, and whatever other prompts there are.
    settings: temperature, top_k, top_p, ...: the fields of `gpt2.Sampling`.

    A sample ends at the end-of-text token (not shown) or after `max_new_tokens`. A model in training mode is asked
    without its dropout, and stays in training mode. Raises UserError for settings that make no sense, for a prompt
    that is longer than the context, and for a model that gives nan.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    texts = [text for text in prompts for _ in range(num_samples)]
    pieces = stream(
        model,
        tokenizer,
        prompts,
        make_sampling(settings),
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        stop=stop,
        seed=seed,
    )
    for sample, piece in pieces:
        texts[sample] += piece
    if isinstance(prompt, str):
        return texts
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]


def stream(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    prompt: str | list[str] | tuple[str, ...],
    sampling: Sampling | None = None,
    *,
    num_samples: int = 1,
    max_new_tokens: int = 100,
    stop: abc.Sequence[str] = (),
    seed: int | None = None,
) -> Iterator[tuple[int, str]]:
    """`generate` as it happens: yields (sample, text) for every new piece of text, always whole characters.

    Samples are counted on from one prompt to the next: sample s of prompt p is number p * num_samples + s.
    """
    if tokenizer is None:
        raise UserError("this model folder has no tokenizer: text needs one")
    if not 1 <= num_samples <= MAX_SAMPLES or max_new_tokens < 0:
        raise UserError(f"num_samples must be at least 1 and at most {MAX_SAMPLES:,}, max_new_tokens at least 0")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    # an empty prompt begins a text, which is what follows the end of another
    ids = [tokenizer.encode(text, allow_special=True) or [tokenizer.end_of_text] for text in prompts]
    seed = secrets.randbits(32) if seed is None else seed
    requests = [
        GenerationRequest(tokens, sampling or Sampling(), max_new_tokens, seed, sample, (tokenizer.end_of_text,))
        for tokens in ids
        for sample in range(num_samples)
    ]
    longest = max((len(tokens) for tokens in ids), default=0) + max_new_tokens
    engine = Engine(prepare_for_inference(model), max(1, min(len(requests), MAX_BATCH_SIZE)), longest)
    return _stream_samples(engine, requests, [TextStream(tokenizer, stop) for _ in requests])


def _stream_samples(
    engine: Engine, requests: list[GenerationRequest], texts: list["TextStream"]
) -> Iterator[tuple[int, str]]:
    samples: dict[Sequence, int] = {engine.submit(request): i for i, request in enumerate(requests)}
    while not engine.idle:
        for token in engine.step():
            sample = samples[token.sequence]
            if piece := texts[sample].push(token.id):
                yield sample, piece
            if texts[sample].finish_reason:
                engine.cancel(token.sequence)
        for continuation, sample in list(samples.items()):
            if continuation.finish_reason:
                if continuation.error:
                    raise continuation.error
                if piece := texts[sample].flush():
                    yield sample, piece
                del samples[continuation]


def make_sampling(settings: dict[str, Any]) -> Sampling:
    """The settings, by name, as a `Sampling`. Raises UserError for a name that is none."""
    names = list(Sampling.__dataclass_fields__)
    for name in settings:
        if name not in names:
            raise UserError(f"there is no setting '{name}'{did_you_mean(name, names)}")
    return Sampling(**settings)


class TextStream:
    """The text of one continuation, in pieces that are certain when they are given out.

    What could be the beginning of a stop string is held back until it is known, so that a stop string is found
    wherever it lies across the tokens, and never shown in part. What all calls of `push` and a last `flush` return,
    joined, is the text up to the first stop string or the end of the text.

    Raises UserError for a stop string that is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: abc.Sequence[str] = ()) -> None:
        check_stop_strings(stop)
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = StreamDecoder(tokenizer)
        self._pending = ""
        self.finish_reason: str | None = None
        """"stop" once a stop string or the end of the text was met: what follows is not shown."""

    def push(self, token: int) -> str:
        """The text that became certain with `token`: often its own, sometimes none."""
        if self.finish_reason:
            return ""
        if token == self._tokenizer.end_of_text or token >= self._tokenizer.vocab_size:  # an id without text, too
            piece = self.flush()
            self.finish_reason = "stop"
            return piece
        return self._hold_back_stop_prefix(self._decoder.push(token))

    def flush(self) -> str:
        """What was held back, once no more will come."""
        if self.finish_reason:
            return ""
        piece = self._hold_back_stop_prefix(self._decoder.flush())
        piece, self._pending = piece + self._pending, ""
        return piece

    def _hold_back_stop_prefix(self, piece: str) -> str:
        text = self._pending + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.finish_reason, self._pending = "stop", ""
            return text[: min(found)]
        held = max((_partial_stop_length(text, stop) for stop in self._stop), default=0)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held]


def check_stop_strings(stop: abc.Sequence[str]) -> None:
    """Raise UserError for stop strings that cannot be: an empty one is everywhere."""
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise UserError("a stop string must have at least one character")


def _partial_stop_length(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
