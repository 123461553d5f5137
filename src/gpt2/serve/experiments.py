"""Experiments on a model: parts switched off, activations of another text, a steering vector.

    POST /inspect/ablate  the next token without some heads and MLPs
    POST /inspect/patch   the effect of each position's activation from another text, in one layer
    POST /inspect/steer   the next token with the difference of two prompts added to the residual stream

Each request is at most one run over `MAX_INSPECT_TOKENS` tokens and a few short ones; its result is kept. They use
`gpt2.interpret` on modules of their own, which generation does not run.
"""

import math
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter
from pydantic import Field
from torch import Tensor

from gpt2.errors import RequestError
from gpt2.generation.filters import topk_indices
from gpt2.interpret import ablate, patch, trace
from gpt2.serve.inspect import check_tokens, next_logits, partial_bytes, token_text
from gpt2.serve.inspect_worker import InspectRequest, InspectWorker, TokenIds, check_token_id, context_window
from gpt2.serve.models import ServedModel
from gpt2.tokenizer import Tokenizer

MAX_PATCHED_TOKENS = 768  # rows times tokens of the run of a patching request
MAX_PATCH_TEXT = 64  # tokens of a text whose activations are patched
MAX_STEERING_CHARACTERS, MAX_STEERING_TOKENS = 400, 64  # of each prompt of a steering vector
PARTS = {"residual": "hook_resid_pre", "attention": "hook_attn_out", "mlp": "hook_mlp_out"}

Number = Annotated[int, Field(ge=0)]
Head = Annotated[list[Number], Field(min_length=2, max_length=2)]


class _DistributionRequest(InspectRequest):
    """The next token after a text. `asked`: a token to report whatever its probability."""

    top: int = Field(default=8, ge=1, le=50)
    asked: int | None = Field(default=None, ge=0)


class AblateRequest(_DistributionRequest):
    """Switch off heads, [layer, head] each from 0, and the MLPs of layers."""

    heads: Annotated[list[Head], Field(max_length=8192, fail_fast=True)] = Field(default_factory=list)
    mlps: Annotated[list[Number], Field(max_length=512, fail_fast=True)] = Field(default_factory=list)
    mode: Literal["zero", "mean"] = "zero"


class PatchRequest(InspectRequest):
    """Patch the activations of `source` into the text, in one layer, at each position.

    target, alternative: the tokens whose logits are compared; by default the top tokens after `source` and the text.
    """

    source: TokenIds
    layer: int = Field(ge=0)
    part: Literal["residual", "attention", "mlp"] = "residual"
    target: int | None = Field(default=None, ge=0)
    alternative: int | None = Field(default=None, ge=0)


class SteerRequest(_DistributionRequest):
    """Add `strength` times the difference of two prompts to the residual stream before a layer, at every position."""

    plus: str = Field(min_length=1, max_length=MAX_STEERING_CHARACTERS)
    minus: str = Field(min_length=1, max_length=MAX_STEERING_CHARACTERS)
    layer: int = Field(ge=0)
    strength: float = Field(default=1.0, ge=-100, le=100)


def add_experiment_routes(router: APIRouter, worker: InspectWorker) -> None:
    """Add the routes of this module."""

    worker.add_route(router, "/inspect/ablate", AblateRequest, _ablate, keep=True)
    worker.add_route(router, "/inspect/patch", PatchRequest, _patch, keep=True)
    worker.add_route(router, "/inspect/steer", SteerRequest, _steer, keep=True)


def _ablate(worker: InspectWorker, served: ServedModel, ids: list[int], body: AblateRequest) -> dict[str, Any]:
    ids = _prepare(served, ids, body)
    heads = [(layer, head) for layer, head in body.heads]
    row = torch.tensor([ids], device=served.model.device)
    first = min([layer for layer, _ in heads] + body.mlps, default=0)
    resume = _resume(worker, served, ids, first)
    after = ablate(worker.own_model(served), row, heads, body.mlps, body.mode, last_only=True, resume=resume)[0, 0]
    return _compare(worker, served, ids, after, body)


def _steer(worker: InspectWorker, served: ServedModel, ids: list[int], body: SteerRequest) -> dict[str, Any]:
    ids, model = _prepare(served, ids, body), worker.own_model(served)
    name = f"{_block(served, body.layer)}.hook_resid_pre"

    def last(text: str) -> Tensor:
        """The residual stream (C,) at the end of a prompt."""
        tokens = served.encode(text)
        if len(tokens) > min(MAX_STEERING_TOKENS, model.config.block_size):
            raise RequestError(f"a steering prompt has at most {MAX_STEERING_TOKENS} tokens, not {len(tokens)}")
        return trace(model, torch.tensor([tokens], device=model.device), [name])[name][0, -1]

    vector = last(body.plus) - last(body.minus)
    row = torch.tensor([ids], device=model.device)
    resume = _resume(worker, served, ids, body.layer)
    after = patch(model, row, {name: lambda x: x + body.strength * vector}, last_only=True, resume=resume)[0, 0]
    return _compare(worker, served, ids, after, body) | {"norm": round(float(vector.norm()), 4)}


def _patch(worker: InspectWorker, served: ServedModel, ids: list[int], body: PatchRequest) -> dict[str, Any]:
    """The difference of the two logits: of the text, of `source`, and with each span of positions from `source`."""
    model, block = worker.own_model(served), _block(served, body.layer)
    name, before = f"{block}.{PARTS[body.part]}", f"{block}.hook_resid_pre"
    _check_pair(served, ids, body)
    pair = torch.tensor([ids, body.source], device=model.device)  # (2, T)
    run = trace(model, pair, {name, before})
    last, source = run.logits[:, -1].float(), run[name][1]  # (2, V), (T, C)
    target = int(last[1].argmax()) if body.target is None else body.target
    alternative = body.alternative
    if alternative is None:
        alternative = next(i for i in topk_indices(last[:1], 2)[0].tolist() if i != target)
    spans = _spans(ids, body.source)

    def replace(x: Tensor) -> Tensor:
        x = x.clone()  # (spans, T, C)
        for i, (start, end) in enumerate(spans):
            x[i, start:end] = source[start:end]
        return x

    values = list[float]()
    if spans:
        rows, resume = pair[:1].expand(len(spans), -1), (body.layer, run[before][:1].expand(len(spans), -1, -1))
        patched = patch(model, rows, {name: replace}, last_only=True, resume=resume)[:, 0].float()
        values = (patched[:, target] - patched[:, alternative]).tolist()
    base, reached = (last[:, target] - last[:, alternative]).tolist()
    tokens = [{"id": i, "text": token_text(served.tokenizer, i)} for i in (target, alternative)]
    texts = [[token_text(served.tokenizer, i) for i in row] for row in (ids, body.source)]
    found = {"spans": spans, "values": values, "base": base, "source": reached, "texts": texts}
    return found | {"target": tokens[0], "alternative": tokens[1]}


def _prepare(served: ServedModel, ids: list[int], body: _DistributionRequest) -> list[int]:
    """The tokens that the run has, from the end of the text."""
    check_token_id(served, body.asked)
    check_tokens(served.model, ids)
    return context_window(served, ids, None)[0]


def _resume(worker: InspectWorker, served: ServedModel, ids: list[int], layer: int) -> tuple[int, Tensor]:
    """A layer and the residual stream before it, from what is known of the text."""
    layer = min(layer, served.model.config.n_layer - 1)
    return layer, worker.text(served).update(ids).streams[layer, : len(ids)][None].clone()


def _block(served: ServedModel, layer: int) -> str:
    if layer >= served.model.config.n_layer:
        raise RequestError(f"there is no layer {layer}: the model has {served.model.config.n_layer}")
    return f"blocks.{layer}"


def _check_pair(served: ServedModel, ids: list[int], body: PatchRequest) -> None:
    for tokens in (ids, body.source):
        check_tokens(served.model, tokens)
    for token in (body.target, body.alternative):
        check_token_id(served, token)
    if len(ids) != len(body.source):
        message = f"the texts have {len(ids)} and {len(body.source)} tokens: patching takes texts of equal length"
        raise RequestError(message)
    longest = min(MAX_PATCH_TEXT, served.model.config.block_size)
    if len(ids) > longest:
        raise RequestError(f"the texts have {len(ids)} tokens: patching takes at most {longest}")


def _spans(ids: list[int], source: list[int]) -> list[tuple[int, int]]:
    """The positions to patch, from the first difference on: before it, both runs are equal. Long texts have spans of
    several positions, so that all rows together stay within the limit."""
    T = len(ids)
    first = next((i for i in range(T) if ids[i] != source[i]), T)
    width = -(-(T - first) // max(1, MAX_PATCHED_TOKENS // T))
    return [(start, min(T, start + width)) for start in range(first, T, max(1, width))]


def _compare(
    worker: InspectWorker, served: ServedModel, ids: list[int], after: Tensor, body: _DistributionRequest
) -> dict[str, Any]:
    """The most likely tokens before and after an experiment, by the probability after it, and KL(before || after)."""
    before = next_logits(served.model, ids, worker.text(served))[0].log_softmax(-1)  # (V,)
    after = after.float().log_softmax(-1)
    p, q = before.exp(), after.exp()
    shown = topk_indices(torch.maximum(p, q)[None], min(body.top, len(p)))[0].tolist()
    if body.asked is not None and body.asked not in shown:
        shown.append(body.asked)
    shown.sort(key=lambda i: -float(q[i]))
    nats = torch.where(p > 0, p * (before - after), 0.0).sum()
    tokens = [_token(served.tokenizer, i, p, q) for i in shown]
    return {"tokens": tokens, "kl": max(0.0, float(nats) / math.log(2))}  # in bits


def _token(tokenizer: Tokenizer, token: int, before: Tensor, after: Tensor) -> dict[str, Any]:
    name = {"id": token, "text": token_text(tokenizer, token), "bytes": partial_bytes(tokenizer, token)}
    return name | {"raw": float(before[token]), "probability": float(after[token])}
