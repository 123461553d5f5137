"""The log-probabilities of a prompt's own tokens, read a piece at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2.generation.engine import PREFILL_CHUNK, LanguageModel, TopLogprobs, check_finite, eval_mode
from gpt2.generation.sampling import gather_logprobs

LOGITS_CHUNK = 64  # whose logits are held at a time


@dataclass(frozen=True)
class PromptLogprob:
    """A token of a prompt: its log-probability after those before it (None for the first), and the most likely ones."""

    id: int
    logprob: float | None
    top_logprobs: TopLogprobs = ()


class PromptScorer:
    """Reads one prompt at a time over a cache of its own. `begin`, then `advance` until it gives the tokens."""

    def __init__(self, model: LanguageModel, max_length: int | None = None) -> None:
        self._model = model
        self._cache = model.make_cache(1, min(max_length or model.config.block_size, model.config.block_size))
        self._tokens: list[int] = []
        self._top_logprobs = 0
        self._results: list[PromptLogprob] = []

    @property
    def row_bytes(self) -> int:
        """What a row of a cache for this model takes."""
        return self._cache.data.nbytes

    def start(self, tokens: Sequence[int], top_logprobs: int) -> None:
        """Take another prompt."""
        self._tokens, self._top_logprobs = list(tokens), top_logprobs
        self._results = [PromptLogprob(self._tokens[0], None)]
        self._cache.lengths[0] = 0

    @torch.inference_mode()
    def step(self) -> list[PromptLogprob] | None:
        """Read up to CHUNK tokens on; all tokens once they are read. Raises UserError for a model that gives nan."""
        read = len(self._results) - 1
        chunk = self._tokens[read:-1][:PREFILL_CHUNK]
        if chunk:
            with eval_mode(self._model):
                hidden = self._model.hidden_states(torch.tensor([chunk], device=self._model.device), self._cache)[0]
                for start in range(0, len(chunk), LOGITS_CHUNK):
                    self._score_chunk(self._model.lm_head(hidden[start : start + LOGITS_CHUNK]))
        return self._results if len(self._results) == len(self._tokens) else None

    def _score_chunk(self, logits: Tensor) -> None:
        """Logits (rows, V) at the tokens before the next ones."""
        check_finite(logits)
        first = len(self._results)
        ids = self._tokens[first : first + len(logits)]
        own, best, values = gather_logprobs(logits, torch.tensor(ids, device=logits.device), self._top_logprobs)
        for i, logprob, likely, theirs in zip(ids, own.tolist(), best.tolist(), values.tolist(), strict=True):
            self._results.append(PromptLogprob(i, logprob, tuple(zip(likely, theirs, strict=True))))
