"""What a model computed for a text: attention matrices, kinds of heads, contributions to a logit, the logit lens.

    POST /inspect/heads          the attention of all heads, as thumbnails
    POST /inspect/head           the whole attention matrix of one head
    POST /inspect/head-scores    how much each head attends to the previous token, to a duplicate, and by induction
    POST /inspect/contributions  what each head and MLP adds to the logit of a token (direct logit attribution)
    POST /inspect/lens-map       the logit lens by layer and position

All of it is computed from the residual streams, keys and values of the inspected text, without another run.
"""

import base64
from dataclasses import asdict
from typing import Any

import torch
from fastapi import APIRouter
from pydantic import Field

from gpt2.errors import RequestError
from gpt2.interpret import attribute_logit
from gpt2.serve.inspect import check_tokens, partial_bytes, token_offsets, token_text
from gpt2.serve.inspect_worker import InspectRequest, InspectWorker, TokenIds, check_token_id, context_window
from gpt2.serve.models import ServedModel

THUMBNAIL = 24  # rows and columns of a thumbnail
MAX_LENS_POSITIONS = 48  # in one request: each takes the head of the model once for every layer


class HeadRequest(InspectRequest):
    """One head, counted from 0."""

    layer: int = Field(ge=0)
    head: int = Field(ge=0)


class HeadScoresRequest(InspectRequest):
    """The kinds of the heads, which do not depend on a text: none is needed."""

    tokens: TokenIds | None = Field(default_factory=list)


class ContributionsRequest(InspectRequest):
    """The contributions to the logit of `target` after the text, or to its difference from `alternative`'s."""

    target: int = Field(ge=0)
    alternative: int | None = Field(default=None, ge=0)


class LensMapRequest(InspectRequest):
    """The logit lens at the last positions up to `position`. `asked`: the token that comes after the text."""

    position: int | None = Field(default=None, ge=0)
    positions: int = Field(default=24, ge=1, le=MAX_LENS_POSITIONS)
    asked: int | None = Field(default=None, ge=0)


def add_inside_routes(router: APIRouter, worker: InspectWorker) -> None:
    """Add the routes of this module."""

    worker.add_route(router, "/inspect/heads", InspectRequest, _heads)
    worker.add_route(router, "/inspect/head", HeadRequest, _head)
    worker.add_route(router, "/inspect/head-scores", HeadScoresRequest, _head_scores)
    worker.add_route(router, "/inspect/contributions", ContributionsRequest, _contributions)
    worker.add_route(router, "/inspect/lens-map", LensMapRequest, _lens_map)


def _window_texts(worker: InspectWorker, served: ServedModel, ids: list[int]) -> tuple[list[int], dict[str, Any]]:
    """The tokens that are shown of a text, and where they begin and what they are."""
    check_tokens(served.model, ids)
    ids, _, start = context_window(served, ids, None)
    worker.text(served).update(ids)
    texts = [token_text(served.tokenizer, token) for token in ids]
    return ids, {"start": start, "texts": texts, "offsets": token_offsets(served.tokenizer, ids)}


def _heads(worker: InspectWorker, served: ServedModel, ids: list[int], body: InspectRequest) -> dict[str, Any]:
    """Thumbnails in base64: of each head uint8 (size, size), 255 for a weight of 1; the first column is one token."""
    ids, shown = _window_texts(worker, served, ids)
    small = worker.text(served).thumbnails(THUMBNAIL, len(ids))  # (L, H, size, size)
    maps = [[base64.b64encode(head.numpy().tobytes()).decode() for head in layer] for layer in small]
    return shown | {"size": small.size(-1), "heads": maps}


def _head(worker: InspectWorker, served: ServedModel, ids: list[int], body: HeadRequest) -> dict[str, Any]:
    """The lower triangle of a matrix by rows in base64: uint16 (little-endian), 65535 for a weight of 1."""
    config = served.model.config
    if body.layer >= config.n_layer or body.head >= config.n_head:
        there = f"there are {config.n_layer} layers of {config.n_head} heads"
        raise RequestError(f"there is no head {body.head} in layer {body.layer}: {there}")
    ids, shown = _window_texts(worker, served, ids)
    pattern = worker.text(served).pattern(body.layer)[body.head, : len(ids), : len(ids)].cpu()  # (T, T)
    rows, columns = torch.tril_indices(*pattern.shape).unbind()
    weights = (pattern[rows, columns] * 65535).round().int().numpy().astype("<u2")
    return shown | {"weights": base64.b64encode(weights.tobytes()).decode()}


def _head_scores(worker: InspectWorker, served: ServedModel, ids: list[int], body: InspectRequest) -> dict[str, Any]:
    found = asdict(worker.scores(served))
    return {name: [[round(p, 4) for p in layer] for layer in scores.tolist()] for name, scores in found.items()}


def _contributions(
    worker: InspectWorker, served: ServedModel, ids: list[int], body: ContributionsRequest
) -> dict[str, Any]:
    for token in (body.target, body.alternative):
        check_token_id(served, token)
    ids, shown = _window_texts(worker, served, ids)
    run = worker.text(served).activations(len(ids) - 1)
    parts = attribute_logit(served.model, run, body.target, body.alternative)
    named = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in vars(parts).items()}
    return {"start": shown["start"], "position": shown["start"] + len(ids) - 1, **named}


def _lens_map(worker: InspectWorker, served: ServedModel, ids: list[int], body: LensMapRequest) -> dict[str, Any]:
    """By layer, from the embedding, and position: the top token, its probability, and that of the next token."""
    check_token_id(served, body.asked)
    check_tokens(served.model, ids)
    ids, position, start = context_window(served, ids, body.position)
    text, tokenizer = worker.text(served).update(ids), served.tokenizer
    first = max(0, position + 1 - body.positions)
    following = [*ids[1:], -1 if body.asked is None else body.asked]
    cells = text.lens({i: max(0, following[i]) for i in range(first, position + 1)})
    by_layer = [list(zip(*column, strict=True)) for column in cells]  # positions, layers, (token, probability, target)
    known = {token for column in by_layer for token, _, _ in column}
    names = {i: {"text": token_text(tokenizer, i), "bytes": partial_bytes(tokenizer, i)} for i in known}
    return {
        "start": start,
        "first": start + first,
        "tokens": [{"id": i, "text": token_text(tokenizer, i)} for i in ids[first : position + 1]],
        "following": [None if i < 0 else token_text(tokenizer, i) for i in following[first : position + 1]],
        "names": names,
        "layers": [[[i, round(p, 5), round(q, 5)] for i, p, q in layer] for layer in zip(*by_layer, strict=True)],
    }
