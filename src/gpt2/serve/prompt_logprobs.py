"""Log-probabilities of a prompt's own tokens (`echo` with `logprobs`), computed by chunked prefill."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2.generation.engine import PREFILL_CHUNK, LanguageModel, TopLogprobs, check_finite, eval_mode
from gpt2.generation.sampling import gather_logprobs

LOGITS_CHUNK = 64  # positions whose logits are in memory at the same time


@dataclass(frozen=True)
class TokenLogprob:
    """A token of a prompt or of a generated sequence.

    logprob:      natural logarithm of its probability after the tokens before it; None for the first of a prompt.
    top_logprobs: the most likely token ids with their log-probabilities, best first.
    offset:       where its text begins in the text of the choice, in characters; known once the text is decoded.
    """

    id: int
    logprob: float | None
    top_logprobs: TopLogprobs = ()
    offset: int = 0


class PromptScorer:
    """Scores one prompt at a time, with a KV cache of its own: `start`, then `step` until it returns the tokens."""

    def __init__(self, model: LanguageModel, max_length: int | None = None) -> None:
        self._model = model
        self._cache = model.make_cache(1, min(max_length or model.config.block_size, model.config.block_size))
        self._tokens: list[int] = []
        self._top_logprobs = 0
        self._results: list[TokenLogprob] = []

    @property
    def row_bytes(self) -> int:
        """The size of one row of the KV cache of this model."""
        return self._cache.data.nbytes

    def start(self, tokens: Sequence[int], top_logprobs: int) -> None:
        """Begin with another prompt."""
        self._tokens, self._top_logprobs = list(tokens), top_logprobs
        self._results = [TokenLogprob(self._tokens[0], None)]
        self._cache.lengths[0] = 0

    @torch.inference_mode()
    def step(self) -> list[TokenLogprob] | None:
        """Prefill up to PREFILL_CHUNK tokens. Returns all tokens after the last chunk, and None before.

        Raises NonFiniteLogitsError.
        """
        done = len(self._results) - 1
        chunk = self._tokens[done:-1][:PREFILL_CHUNK]
        if chunk:
            with eval_mode(self._model):
                hidden = self._model.hidden_states(torch.tensor([chunk], device=self._model.device), self._cache)[0]
                for start in range(0, len(chunk), LOGITS_CHUNK):
                    self._score_chunk(self._model.lm_head(hidden[start : start + LOGITS_CHUNK]))
        return self._results if len(self._results) == len(self._tokens) else None

    def _score_chunk(self, logits: Tensor) -> None:
        """Append the tokens that follow the positions of these logits (T, V)."""
        check_finite(logits)
        first = len(self._results)
        ids = self._tokens[first : first + len(logits)]
        logprobs, top_ids, top_values = gather_logprobs(
            logits, torch.tensor(ids, device=logits.device), self._top_logprobs
        )
        rows = zip(ids, logprobs.tolist(), top_ids.tolist(), top_values.tolist(), strict=True)
        self._results += [
            TokenLogprob(token, logprob, tuple(zip(top, values, strict=True))) for token, logprob, top, values in rows
        ]
