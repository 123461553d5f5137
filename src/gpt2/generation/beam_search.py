"""Beam search: the few most likely continuations are kept at every length, and those that came to an end."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gpt2.cache import KVCache
from gpt2.errors import UserError
from gpt2.generation.engine import LanguageModel, eval_mode
from gpt2.generation.filters import bias_logits, topk_indices
from gpt2.generation.sampling import MAX_ABS_SETTING, History, Sampling, apply_penalties
from gpt2.generation.search import (
    NO_PENALTIES,
    check_prompt,
    encode_prompt,
    forward_hidden_states,
    last_logits,
    reorder_cache,
    stream_text,
)
from gpt2.tokenizer import Tokenizer

MAX_LENGTH_PENALTY = 100.0  # of length penalties: a context's length to this power is still a number

StoppingCriterion = Callable[[list[int]], bool]


@dataclass(frozen=True)
class Hypothesis:
    """A continuation that beam search found.

    tokens: the new tokens, with the end token if it met one.
    score:  the sum of their log-probabilities (natural; penalties count) over len(tokens) ** length_penalty.
    """

    tokens: list[int]
    score: float


@dataclass
class _Beam:
    tokens: list[int]  # prompt and continuation
    score: float  # the sum of log-probabilities
    cache_row: int  # of the cache, where all but the last token have been read


@dataclass
class _BeamGroup:
    """Beams that compete with each other. `beams` is empty once nothing can better what is `finished`, best first."""

    size: int
    prompt_length: int
    max_new_tokens: int  # new tokens
    length_penalty: float
    early_stopping: bool | Literal["never"]
    end_tokens: Sequence[int]
    stopping_criterion: StoppingCriterion
    beams: list[_Beam]
    finished: list[Hypothesis] = field(default_factory=list)

    def advance(self, candidates: Sequence[tuple[float, _Beam, int]]) -> list[int]:
        """Go on with the best of (sum of log-probabilities, beam, next token), which come best first.

        Only the best `size` may finish; those below them are there to go on in their place. Returns the tokens with
        which the text goes on, or would, were this not its last.
        """
        going: list[_Beam] = []
        length = len(self.beams[0].tokens) + 1 - self.prompt_length
        for rank, (score, parent, token) in enumerate(candidates):
            tokens = [*parent.tokens, token]
            new = tokens[self.prompt_length :]
            ends = token in self.end_tokens or self.stopping_criterion(new)
            if rank < self.size and (ends or length == self.max_new_tokens):
                self.finished.append(Hypothesis(new, self._normalized_score(score, length)))
            if not ends and len(going) < self.size:
                going.append(_Beam(tokens, score, parent.cache_row))
        self.finished = sorted(self.finished, key=lambda found: -found.score)[: self.size]
        self.beams = [] if self._is_done(going, length) else going
        return [beam.tokens[-1] for beam in going]

    def _is_done(self, live_beams: list[_Beam], length: int) -> bool:
        if not live_beams or length == self.max_new_tokens:
            return True
        if len(self.finished) < self.size:
            return False
        if self.early_stopping is True:
            return True
        longest = self.early_stopping == "never" and self.length_penalty > 0
        return (
            self._normalized_score(live_beams[0].score, self.max_new_tokens if longest else length)
            <= self.finished[-1].score
        )

    def _normalized_score(self, score: float, length: int) -> float:
        return score / length**self.length_penalty


def _never_stop(tokens: list[int]) -> bool:
    return False


def beam_search(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    num_return: int = 1,
    num_beam_groups: int = 1,
    diversity_penalty: float = 0.0,
    sampling: Sampling = NO_PENALTIES,
    end_tokens: Sequence[int] = (),
    stopping_criterion: StoppingCriterion = _never_stop,
) -> list[Hypothesis]:
    """The most likely continuations of `prompt_ids`, best first, by a search that is not exhaustive.

    num_beams:         so many continuations are kept at every length, and as many finished ones.
    length_penalty:    the power of the length that a sum of log-probabilities is divided by: the larger it is, the
                       more a long continuation is worth; 0 for the plain sum.
    early_stopping:    when, with `num_beams` finished ones, the search ends before `max_new_tokens`. True: at once.
                       False: when the best beam, were it finished as it is, is no better than the worst of them.
                       "never": when it could not be better at any length.
    num_return:        how many to return; fewer come when `end_tokens`, bans or `stopped` leave fewer.
    num_beam_groups:   the beams search in so many groups, one after the other at each step, ...
    diversity_penalty: ... and this is subtracted from a token's log-probability for each beam of an earlier group
                       that has just taken it.
    sampling:          biases, penalties and bans, on the log-probabilities; nothing else of it has a say.
    end_tokens:        ids that end a continuation.
    stopped:           new tokens -> whether the last of them ends the continuation.

    Works on any `LanguageModel` and device, in memory for `num_beams` rows of a cache. A continuation ends where the
    context is full, whatever `max_new_tokens`: the last of its tokens is the one that would not fit any more.
    Raises UserError for settings that cannot be, for a prompt that is empty or longer than the context, for a model
    that gives nan, and when the bans leave nothing to say.

    Source: Graves 2012 and Sutskever et al. 2014 for the search; Vijayakumar et al. 2016 for diverse groups, with
    the Hamming diversity of section 4. Tokens and scores are those of `generate` in transformers 5.23.
    """
    _check_beams(num_beams, num_return, num_beam_groups, model.config.vocab_size)
    _check_scores(length_penalty, early_stopping, diversity_penalty, num_beam_groups)
    prompt = list(prompt_ids)
    room = check_prompt(model, prompt, max_new_tokens, sampling)
    limit = min(max_new_tokens, room + 1)  # the last one is not read
    if limit == 0:
        return [Hypothesis([], 0.0)]
    rules = (
        num_beams // num_beam_groups,
        len(prompt),
        limit,
        length_penalty,
        early_stopping,
        end_tokens,
        stopping_criterion,
    )
    groups = [_BeamGroup(*rules, [_Beam(prompt, 0.0, 0)]) for _ in range(num_beam_groups)]
    with torch.inference_mode(), eval_mode(model):
        cache = model.make_cache(num_beams, len(prompt) + limit - 1)
        logits = last_logits(model, forward_hidden_states(model, [prompt], cache[:1]))  # (1, V)
        cache.reorder([0] * num_beams)
        while True:
            _advance_groups(groups, logits.log_softmax(-1), sampling, diversity_penalty)
            beams = [beam for group in groups for beam in group.beams]
            if not beams:
                break
            beams = _assign_cache_rows(beams, cache, len(prompt))
            last = [beam.tokens[-1:] for beam in beams]
            logits = last_logits(model, forward_hidden_states(model, last, cache[: len(beams)]))  # (n, V)
    finished = [found for group in groups for found in group.finished]
    if not finished:
        raise UserError("the settings rule out every token, from the first one on or at a dead end")
    return sorted(finished, key=lambda found: -found.score)[:num_return]


def _advance_groups(groups: list[_BeamGroup], logprobs: Tensor, sampling: Sampling, diversity_penalty: float) -> None:
    """One token for every beam, group after group; logprobs (rows, V) in float32."""
    taken: Counter[int] = Counter()
    for group in groups:
        if not group.beams:
            continue
        own = logprobs[[beam.cache_row for beam in group.beams]]  # (n, V)
        if diversity_penalty and taken:
            bias_logits(own, [(token, -diversity_penalty * n) for token, n in taken.items()], in_place=True)
        histories = [History(beam.tokens, group.prompt_length, group.end_tokens) for beam in group.beams]
        own = _apply_penalties(own, sampling, histories)
        before = torch.tensor([beam.score for beam in group.beams], dtype=own.dtype, device=own.device)
        sums = (own + before[:, None]).view(1, -1)  # (1, n * V)
        wanted = group.size * (1 + max(1, len(set(group.end_tokens))))  # so that `size` of them are not ends
        ids = topk_indices(sums, min(wanted, sums.size(-1)))
        scores, places = sums.gather(-1, ids)[0].tolist(), ids[0].tolist()
        candidates = [
            (score, group.beams[at // own.size(-1)], at % own.size(-1))
            for score, at in zip(scores, places, strict=True)
            if score > -torch.inf
        ]
        taken.update(group.advance(candidates))


def _apply_penalties(logprobs: Tensor, sampling: Sampling, histories: list[History]) -> Tensor:
    """`adjusted`, but where every token of a row is ruled out, that beam is at its end and the others go on."""
    try:
        return apply_penalties(logprobs, sampling, histories)
    except UserError:
        if len(logprobs) == 1:
            return torch.full_like(logprobs, -torch.inf)
    return torch.cat([_apply_penalties(logprobs[i : i + 1], sampling, [histories[i]]) for i in range(len(histories))])


def _assign_cache_rows(beams: list[_Beam], cache: KVCache, prefix_length: int) -> list[_Beam]:
    """The beams in the order of the rows they get: one stays in its parent's row, so that few are copied."""
    placed: dict[int, _Beam] = {}
    others = []
    for beam in beams:
        if beam.cache_row < len(beams) and beam.cache_row not in placed:
            placed[beam.cache_row] = beam
        else:
            others.append(beam)
    ordered = [placed[row] if row in placed else others.pop() for row in range(len(beams))]
    reorder_cache(cache, [beam.cache_row for beam in ordered], prefix_length)
    for row, beam in enumerate(ordered):
        beam.cache_row = row
    return ordered


def _check_beams(num_beams: int, num_return: int, num_beam_groups: int, vocab_size: int) -> None:
    if not 1 <= num_beams <= vocab_size:
        raise UserError(f"num-beams must be at least 1 and at most the vocabulary's {vocab_size:,}, not {num_beams}")
    if not 1 <= num_return <= num_beams:
        raise UserError(f"num-return must be at least 1 and at most num-beams ({num_beams}), not {num_return}")
    if num_beam_groups < 1 or num_beams % num_beam_groups:
        raise UserError(f"num-beam-groups must divide num-beams ({num_beams}) evenly, not {num_beam_groups}")


def _check_scores(
    length_penalty: float, early_stopping: bool | str, diversity_penalty: float, num_beam_groups: int
) -> None:
    if not abs(length_penalty) <= MAX_LENGTH_PENALTY:
        raise UserError(f"length-penalty must be at most {MAX_LENGTH_PENALTY:.0f} either way, not {length_penalty}")
    if not (isinstance(early_stopping, bool) or early_stopping == "never"):
        raise UserError(f"early-stopping must be True, False or 'never', not {early_stopping!r}")
    if not 0 <= diversity_penalty <= MAX_ABS_SETTING:
        raise UserError(
            f"diversity-penalty must be 0 or more and at most {MAX_ABS_SETTING:,.0f}, not {diversity_penalty}"
        )
    if diversity_penalty and num_beam_groups == 1:
        raise UserError("diversity-penalty needs num-beam-groups of 2 or more: it keeps groups apart")


def beam_search_texts(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    prompt: str,
    *,
    num_beams: int = 5,
    max_new_tokens: int = 100,
    stop: Sequence[str] = (),
    **settings: Any,
) -> list[str]:
    """The `num_return` best continuations of `prompt` that beam search finds, best first, prompt included.

        texts = beam_texts(model, tokenizer, "Hello", num_beams=5, num_return=3)

    stop:     a continuation ends with the first of these strings, which is not shown.
    settings: those of `beam_search`: length_penalty, early_stopping, num_return, sampling, ...

    The end-of-text token ends a continuation, too. Raises what `beam_search` does, and UserError without a tokenizer.
    """
    tokenizer, ids = encode_prompt(tokenizer, prompt, stop)
    hypotheses = beam_search(
        model,
        ids,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        end_tokens=(tokenizer.end_of_text,),
        stopping_criterion=_make_stopping_criterion(tokenizer, stop),
        **settings,
    )
    return [prompt + "".join(stream_text(tokenizer, found.tokens, stop)) for found in hypotheses]


def _make_stopping_criterion(tokenizer: Tokenizer, stop: Sequence[str]) -> StoppingCriterion:
    """Whether a continuation has a stop string that ends in its last token, or a last token without text."""
    reach = max((len(text.encode()) for text in stop), default=0)  # no string is more tokens than bytes

    def stopped(tokens: list[int]) -> bool:
        if tokens[-1] >= tokenizer.vocab_size:
            return True
        end = tokenizer.decode(tokens[-reach:]) if reach else ""
        return any(text in end for text in stop)

    return stopped
