"""Beam search: keep the `num_beams` most likely unfinished and finished continuations at every length."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gpt2.cache import KVCache
from gpt2.errors import RequestError
from gpt2.generation.engine import GenerationRequest, LanguageModel, check_request, eval_mode
from gpt2.generation.filters import bias_logits, topk_indices
from gpt2.generation.sampling import MAX_ABS_SETTING, History, Sampling, apply_penalties, check_setting
from gpt2.generation.search import (
    NO_PENALTIES,
    forward_hidden_states,
    last_logits,
    reorder_cache,
)
from gpt2.generation.text import check_stop_strings, encode_prompt, require_tokenizer, stream_text
from gpt2.tokenizer import Tokenizer

MAX_LENGTH_PENALTY = 100.0  # the length of a context to this power is still finite in float64

StoppingCriterion = Callable[[list[int]], bool]


@dataclass(frozen=True)
class Hypothesis:
    """A finished continuation.

    tokens: the new tokens, with the end token if there is one.
    score:  the sum of their natural log-probabilities, after penalties, over len(tokens) ** length_penalty.
    """

    tokens: list[int]
    score: float


@dataclass
class _Beam:
    tokens: list[int]  # prompt and new tokens
    score: float  # the sum of log-probabilities
    cache_row: int  # all tokens but the last are cached there


@dataclass
class _BeamGroup:
    """Beams that compete with each other. `finished` is sorted, best first; `beams` is empty once the group is done."""

    request: GenerationRequest
    size: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    stopping_criterion: StoppingCriterion
    beams: list[_Beam]
    finished: list[Hypothesis] = field(default_factory=list)

    def advance(self, candidates: Sequence[tuple[float, _Beam, int]]) -> list[int]:
        """Extend the beams by the best of (sum of log-probabilities, beam, next token), sorted best first.

        Only the best `size` candidates may finish; those below replace finished ones as beams. Returns the next token
        of every beam, including those that end here because the length limit is reached.
        """
        live: list[_Beam] = []
        prompt_length, max_new_tokens = len(self.request.prompt), self.request.max_new_tokens
        length = len(self.beams[0].tokens) + 1 - prompt_length
        for rank, (score, parent, token) in enumerate(candidates):
            tokens = [*parent.tokens, token]
            new = tokens[prompt_length:]
            ends = token in self.request.end_tokens or self.stopping_criterion(new)
            if rank < self.size and (ends or length == max_new_tokens):
                self.finished.append(Hypothesis(new, self._normalized_score(score, length)))
            if not ends and len(live) < self.size:
                live.append(_Beam(tokens, score, parent.cache_row))
        self.finished = sorted(self.finished, key=lambda found: -found.score)[: self.size]
        self.beams = [] if self._is_done(live, length) else live
        return [beam.tokens[-1] for beam in live]

    def _is_done(self, live_beams: list[_Beam], length: int) -> bool:
        max_new_tokens = self.request.max_new_tokens
        if not live_beams or length == max_new_tokens:
            return True
        if len(self.finished) < self.size:
            return False
        if self.early_stopping is True:
            return True
        best_length = max_new_tokens if self.early_stopping == "never" and self.length_penalty > 0 else length
        return self._normalized_score(live_beams[0].score, best_length) <= self.finished[-1].score

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
    """The most likely continuations of `prompt_ids` that beam search finds, best first.

    num_beams:          the number of unfinished, and of finished, continuations that are kept at every length.
    length_penalty:     a sum of log-probabilities is divided by the length to this power: larger values favour long
                        continuations; 0 for the plain sum.
    early_stopping:     when the search stops with `num_beams` finished hypotheses. True: at once. False: when the
                        score of the best beam at its present length is no better than the worst finished score.
                        "never": when it could not be better at any length.
    num_return:         how many to return, at most: `end_tokens`, bans or `stopping_criterion` may leave fewer.
    num_beam_groups:    number of groups for diverse beam search; at each step they choose one after the other.
    diversity_penalty:  subtracted from the log-probability of a token for each beam of an earlier group that has
                        chosen it at this step.
    sampling:           its biases, penalties and bans apply to the log-probabilities; the rest is ignored.
    end_tokens:         ids that end a continuation.
    stopping_criterion: new tokens -> whether the last of them ends the continuation.

    Works on any `LanguageModel` and device; the KV cache has `num_beams` rows. A continuation also ends when the
    context is full: its last token is the first that does not fit.
    Raises RequestError for settings that are not supported, for a prompt that is empty or longer than the context, and
    when the bans rule out every token; NonFiniteLogitsError if the model computes nan or inf.

    Source: Graves 2012 and Sutskever et al. 2014 for the search; Vijayakumar et al. 2016 for diverse groups, with
    the Hamming diversity of section 4. Tokens and scores are those of `generate` in transformers 5.23.
    """
    _check_beams(num_beams, num_return, num_beam_groups, model.config.vocab_size)
    _check_scores(length_penalty, early_stopping, diversity_penalty, num_beam_groups)
    prompt, context = list(prompt_ids), model.config.block_size
    request = GenerationRequest(prompt, sampling, max_new_tokens, end_tokens=tuple(end_tokens))
    check_request(request, model.config.vocab_size, context)
    limit = min(max_new_tokens, context - len(prompt) + 1)  # the model need not run on the last token
    if limit == 0:
        return [Hypothesis([], 0.0)]
    settings = (num_beams // num_beam_groups, length_penalty, early_stopping, stopping_criterion)
    request = replace(request, max_new_tokens=limit)
    groups = [_BeamGroup(request, *settings, [_Beam(prompt, 0.0, 0)]) for _ in range(num_beam_groups)]
    with torch.inference_mode(), eval_mode(model):
        cache = model.make_cache(num_beams, len(prompt) + limit - 1)
        logits = last_logits(model, forward_hidden_states(model, [prompt], cache[:1]))  # (1, V)
        cache.reorder([0] * num_beams)
        while True:
            _advance_groups(groups, logits.log_softmax(-1), diversity_penalty)
            beams = [beam for group in groups for beam in group.beams]
            if not beams:
                break
            beams = _assign_cache_rows(beams, cache, len(prompt))
            last = [beam.tokens[-1:] for beam in beams]
            logits = last_logits(model, forward_hidden_states(model, last, cache[: len(beams)]))  # (n, V)
    finished = [found for group in groups for found in group.finished]
    if not finished:
        raise RequestError("the settings rule out every token of every beam")
    return sorted(finished, key=lambda found: -found.score)[:num_return]


def _advance_groups(groups: list[_BeamGroup], logprobs: Tensor, diversity_penalty: float) -> None:
    """Choose one token for every beam, group after group; logprobs (rows, V) in float32."""
    taken: Counter[int] = Counter()
    for group in groups:
        if not group.beams:
            continue
        own = logprobs[[beam.cache_row for beam in group.beams]]  # (n, V)
        if diversity_penalty and taken:
            bias_logits(own, [(token, -diversity_penalty * n) for token, n in taken.items()], in_place=True)
        prompt_length, end_tokens = len(group.request.prompt), group.request.end_tokens
        histories = [History(beam.tokens, prompt_length, end_tokens) for beam in group.beams]
        own = _apply_penalties(own, group.request.sampling, histories)
        scores_so_far = torch.tensor([beam.score for beam in group.beams], dtype=own.dtype, device=own.device)
        sums = (own + scores_so_far[:, None]).view(1, -1)  # (1, n * V)
        num_candidates = group.size * (1 + max(1, len(set(end_tokens))))  # at least `size` are not end tokens
        ids = topk_indices(sums, min(num_candidates, sums.size(-1)))
        scores, places = sums.gather(-1, ids)[0].tolist(), ids[0].tolist()
        candidates = [
            (score, group.beams[at // own.size(-1)], at % own.size(-1))
            for score, at in zip(scores, places, strict=True)
            if score > -torch.inf
        ]
        taken.update(group.advance(candidates))


def _apply_penalties(logprobs: Tensor, sampling: Sampling, histories: list[History]) -> Tensor:
    """`apply_penalties`, but a beam with every token excluded gets minus infinity everywhere."""
    try:
        return apply_penalties(logprobs, sampling, histories)
    except RequestError:
        if len(logprobs) == 1:
            return torch.full_like(logprobs, -torch.inf)
    return torch.cat([_apply_penalties(logprobs[i : i + 1], sampling, [histories[i]]) for i in range(len(histories))])


def _assign_cache_rows(beams: list[_Beam], cache: KVCache, prefix_length: int) -> list[_Beam]:
    """The beams by the cache row they get; one child stays in its parent's row, so that few rows are copied."""
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
    check_setting(
        "num_beams",
        num_beams,
        1 <= num_beams <= vocab_size,
        f"be at least 1 and at most the vocabulary's {vocab_size:,}",
    )
    check_setting(
        "num_return", num_return, 1 <= num_return <= num_beams, f"be at least 1 and at most num-beams ({num_beams})"
    )
    divides = num_beam_groups >= 1 and num_beams % num_beam_groups == 0
    check_setting("num_beam_groups", num_beam_groups, divides, f"divide num-beams ({num_beams}) evenly")


def _check_scores(
    length_penalty: float, early_stopping: bool | str, diversity_penalty: float, num_beam_groups: int
) -> None:
    limit = MAX_LENGTH_PENALTY
    check_setting("length_penalty", length_penalty, abs(length_penalty) <= limit, f"be at most {limit:.0f} either way")
    known = isinstance(early_stopping, bool) or early_stopping == "never"
    check_setting("early_stopping", repr(early_stopping), known, "be True, False or 'never'")
    valid, rule = 0 <= diversity_penalty <= MAX_ABS_SETTING, f"be 0 or more and at most {MAX_ABS_SETTING:,.0f}"
    check_setting("diversity_penalty", diversity_penalty, valid, rule)
    if diversity_penalty and num_beam_groups == 1:
        raise RequestError("diversity-penalty needs num-beam-groups of 2 or more", field="diversity_penalty")


def beam_search_texts(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    prompt: str,
    *,
    num_beams: int = 5,
    max_new_tokens: int = 100,
    stop: Sequence[str] = (),
    skip_special_tokens: bool = True,
    **settings: Any,
) -> list[str]:
    """Continue `prompt` by beam search: the `num_return` best texts, best first, prompt included.

        texts = beam_search_texts(model, tokenizer, "Hello", num_beams=5, num_return=3)

    stop:     stop strings: a continuation ends before the first of them, or at the end-of-text token.
    settings: those of `beam_search`: length_penalty, early_stopping, num_return, sampling, ...

    Raises what `beam_search` does, and ModelFilesError without a tokenizer.
    """
    tokenizer = require_tokenizer(tokenizer)
    check_stop_strings(stop)
    min_tokens = settings.get("sampling", NO_PENALTIES).min_new_tokens
    hypotheses = beam_search(
        model,
        encode_prompt(tokenizer, prompt),
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        end_tokens=tokenizer.end_tokens,
        stopping_criterion=_make_stopping_criterion(tokenizer, stop, min_tokens),
        **settings,
    )
    return [
        prompt
        + "".join(
            stream_text(tokenizer, found.tokens, stop, min_tokens=min_tokens, skip_special_tokens=skip_special_tokens)
        )
        for found in hypotheses
    ]


def _make_stopping_criterion(tokenizer: Tokenizer, stop: Sequence[str], min_tokens: int) -> StoppingCriterion:
    """Whether a stop string is complete with the last token, or the last token has no text (padded vocabulary)."""
    max_tokens = max((len(text.encode()) for text in stop), default=0)  # a token has at least one byte

    def stopped(tokens: list[int]) -> bool:
        if tokens[-1] >= tokenizer.vocab_size:
            return True
        end = tokenizer.decode(tokens[min_tokens:][-max_tokens:]) if max_tokens else ""
        return any(text in end for text in stop)

    return stopped
