"""Generate text from text prompts: whole samples, or a stream of pieces."""

from collections import abc
from collections.abc import Iterable, Iterator
from typing import Any, overload

from gpt2.checks import check_integer, check_texts
from gpt2.errors import ModelFilesError, RequestError, did_you_mean
from gpt2.generation.defaults import MAX_NEW_TOKENS, TOP_K
from gpt2.generation.engine import Engine, GenerationRequest, LanguageModel, Sequence
from gpt2.generation.inference import prepare_for_inference
from gpt2.generation.sampling import Sampling, resolve_seed
from gpt2.generation.stream_decoder import StreamDecoder
from gpt2.tokenizer import Tokenizer

MAX_SAMPLES = 10_000  # of one prompt
MAX_BATCH_SIZE = 64  # samples that are generated at a time; the others wait in the queue


@overload
def generate(
    model: LanguageModel, tokenizer: Tokenizer | None, prompt: str, sampling: Sampling | None = None, **settings: Any
) -> list[str]: ...


@overload
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    prompt: list[str] | tuple[str, ...],
    sampling: Sampling | None = None,
    **settings: Any,
) -> list[list[str]]: ...


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    prompt: str | list[str] | tuple[str, ...],
    sampling: Sampling | None = None,
    *,
    num_samples: int = 1,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: str | abc.Sequence[str] = (),
    seed: int | None = None,
    skip_special_tokens: bool = True,
    **settings: Any,
) -> list[str] | list[list[str]]:
    """Continue `prompt` in `num_samples` ways. Returns the texts, prompt included; a list for each of several prompts.

        texts = gpt2.generate(model, tokenizer, "Hello", num_samples=5, temperature=0.8, top_k=50, seed=42)

    stop:     a stop string, or several: a text ends before the first of them.
    seed:     the same seed gives the same texts; None or -1 draws a new one. Sample i of a prompt does not depend on
              `num_samples` or on the other prompts.
    skip_special_tokens: whether special tokens, such as ``<|im_start|>``, are left out of the text.
    settings: temperature [1], top_k [50], top_p [1], ...: the fields of `gpt2.Sampling`, with its defaults except
              for `top_k`, which are those of `gpt2 sample` and of the server. Or `sampling` with all of them.

    A sample ends at one of `tokenizer.end_tokens` (not part of the text) or after `max_new_tokens`. Dropout is off, and
    a model in training mode stays in training mode. Raises RequestError for settings that are not supported and
    for a prompt longer than the context, ModelFilesError without a tokenizer, NonFiniteLogitsError if the model
    computes nan or inf.
    """
    check_texts("prompt", prompt)
    check_num_samples(num_samples)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    texts = [text for text in prompts for _ in range(num_samples)]
    pieces = stream(
        model,
        tokenizer,
        prompts,
        sampling,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        stop=stop,
        seed=seed,
        skip_special_tokens=skip_special_tokens,
        **settings,
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
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: str | abc.Sequence[str] = (),
    seed: int | None = None,
    skip_special_tokens: bool = True,
    **settings: Any,
) -> Iterator[tuple[int, str]]:
    """`generate` as a stream: yields (sample, text) for every new piece of text, always whole characters.

    sample: p * num_samples + s for sample s of prompt p. The other arguments are those of `generate`.
    """
    tokenizer = require_tokenizer(tokenizer)
    check_texts("prompt", prompt)
    check_num_samples(num_samples)
    check_integer("max_new_tokens", max_new_tokens, 0)
    sampling, seed = make_sampling(settings, sampling), resolve_seed(seed)
    stop = [stop] if isinstance(stop, str) else stop
    prompts = [prompt] if isinstance(prompt, str) else prompt
    ids = [encode_prompt(tokenizer, text) for text in prompts]
    requests = [
        GenerationRequest(tokens, sampling, max_new_tokens, seed, sample, tokenizer.end_tokens)
        for tokens in ids
        for sample in range(num_samples)
    ]
    max_length = max((len(tokens) for tokens in ids), default=0) + max_new_tokens
    engine = Engine(prepare_for_inference(model), max(1, min(len(requests), MAX_BATCH_SIZE)), max_length)
    texts = [
        TextStream(tokenizer, stop, min_tokens=sampling.min_new_tokens, skip_special_tokens=skip_special_tokens)
        for _ in requests
    ]
    return _stream_samples(engine, requests, texts)


def check_num_samples(num_samples: int) -> None:
    """Raise RequestError unless it is an integer from 1 to `MAX_SAMPLES`."""
    check_integer("num_samples", num_samples)
    if not 1 <= num_samples <= MAX_SAMPLES:
        message = f"num_samples must be at least 1 and at most {MAX_SAMPLES:,}, not {num_samples}"
        raise RequestError(message, field="num_samples")


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
        for sequence, sample in list(samples.items()):
            if sequence.finish_reason:
                if sequence.error:
                    raise sequence.error
                if piece := texts[sample].flush():
                    yield sample, piece
                del samples[sequence]


def make_sampling(settings: abc.Mapping[str, Any], sampling: Sampling | None = None) -> Sampling:
    """A `Sampling` from settings by name, with `TOP_K` unless they say otherwise; or `sampling`, without settings.

    Raises RequestError for an unknown name, a value that is not supported, and for both.
    """
    names = list(Sampling.__dataclass_fields__)
    for name in settings:
        if name not in names:
            raise RequestError(f"there is no setting '{name}'{did_you_mean(name, names)}", field=name)
    if sampling is None:
        return Sampling(**{"top_k": TOP_K, **settings})
    if not isinstance(sampling, Sampling):
        raise RequestError(f"sampling must be a gpt2.Sampling, not {sampling!r:.80}", field="sampling")
    if settings:
        name = next(iter(settings))
        raise RequestError(f"{name} is a field of sampling: give one of the two", field=name)
    return sampling


def require_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """`tokenizer`. Raises ModelFilesError for None."""
    if tokenizer is None:
        raise ModelFilesError("this model folder has no tokenizer: text needs one")
    return tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The token ids of a prompt; for an empty one the end-of-text token, which every training document follows."""
    return [*tokenizer.prompt_prefix, *tokenizer.encode(prompt, allow_special=True)] or [tokenizer.end_of_text]


def stream_text(
    tokenizer: Tokenizer,
    tokens: Iterable[int],
    stop: abc.Sequence[str],
    *,
    min_tokens: int = 0,
    skip_special_tokens: bool = True,
) -> Iterator[str]:
    """Detokenize a stream of ids up to a stop string or the end of text; takes no more ids than that needs."""
    text = TextStream(tokenizer, stop, min_tokens=min_tokens, skip_special_tokens=skip_special_tokens)
    for token in tokens:
        if piece := text.push(token):
            yield piece
        if text.finish_reason:
            return
    if piece := text.flush():
        yield piece


class TextStream:
    """Incremental detokenizer of one sequence with stop strings.

    Text that may be the beginning of a stop string is held back until that is decided, so that a stop string is found
    wherever token boundaries lie, and is never returned in part. The results of all calls of `push` and a last `flush`,
    joined, are the text up to the first stop string or the end of text.

    min_tokens:    the text of this many first tokens is not searched for stop strings.
    skip_special_tokens: special tokens add no text. One that contains a stop string ends the text all the same.
    finish_reason: "stop" after a stop string or one of `tokenizer.end_tokens`; later tokens add no text.

    Raises RequestError for an empty stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: abc.Sequence[str] = (),
        *,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        check_stop_strings(stop)
        self._hidden = {i: text for text, i in tokenizer.special_tokens.items()} if skip_special_tokens else {}
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = StreamDecoder(tokenizer)
        self._min_tokens, self._num_tokens = min_tokens, 0
        self._pending = ""
        self.finish_reason: str | None = None

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now decided, which may be empty."""
        if self.finish_reason:
            return ""
        if token in self._tokenizer.end_tokens or token >= self._tokenizer.vocab_size:  # padded vocabulary
            piece = self.flush()
            self.finish_reason = "stop"
            return piece
        self._num_tokens += 1
        if self._num_tokens <= self._min_tokens:
            return self._decoder.flush() if token in self._hidden else self._decoder.push(token)
        if token in self._hidden:
            return self._hide(self._hidden[token])
        return self._hold_back_stop_prefix(self._decoder.push(token))

    def flush(self) -> str:
        """The text that was held back, at the end of the sequence. A character that is not complete is dropped."""
        if self.finish_reason:
            return ""
        piece, self._pending = self._pending, ""
        return piece

    def _hide(self, special: str) -> str:
        """Add a special token that is not shown; a stop string may end in it, or be part of it."""
        piece = self._decoder.flush()
        text = self._pending + piece
        found = [at for at in ((text + special).find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.finish_reason, self._pending = "stop", ""
            return text[: min(found)]
        return self._hold_back_stop_prefix(piece)

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
    """Raise RequestError unless `stop` is a sequence of non-empty strings."""
    if not isinstance(stop, abc.Iterable) or not all(isinstance(text, str) for text in stop):
        raise RequestError(f"stop must be a list of texts, not {stop!r:.80}", field="stop")
    if isinstance(stop, str) or not all(stop):
        raise RequestError("a stop string must have at least one character", field="stop")


def _partial_stop_length(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
