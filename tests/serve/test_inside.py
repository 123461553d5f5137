"""The routes that look inside a model and experiment on it: against `gpt2.interpret` and direct computations."""

import asyncio
import base64
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from torch import Tensor

import gpt2
from gpt2.interpret import head_scores
from gpt2.serve import inspect_worker
from gpt2.serve.app import create_app
from gpt2.serve.errors import APIError
from gpt2.serve.experiments import MAX_PATCH_TEXT
from tests.helpers.playground_browser import CONFIG, LIMITS, MODELS, PROMPT, TOKENIZER, create_served_models

MODEL = MODELS["one"]
IDS = TOKENIZER.encode(PROMPT + " the mat and the dog ran to the barn while a bird sang")
ROW = torch.tensor([IDS])
CLOSE: dict[str, Any] = {"abs": 1e-4, "rel": 1e-3}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = create_app(create_served_models(MODELS, TOKENIZER, LIMITS), LIMITS)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


def inspect(client: TestClient, route: str, **body: Any) -> Any:
    response = client.post(f"/inspect/{route}", json={"model": "one", **body})
    assert response.status_code == 200, response.text
    return response.json()


def pattern(layer: int, ids: list[int] = IDS) -> Tensor:
    """(H, T, T)"""
    name = f"blocks.{layer}.attn.hook_pattern"
    return gpt2.trace(MODEL, torch.tensor([ids]), [name])[name][0]


def matrix(result: Any) -> Tensor:
    """The attention matrix of a response."""
    T = len(result["texts"])
    packed = np.frombuffer(base64.b64decode(result["weights"]), "<u2") / 65535
    full = torch.zeros(T, T)
    rows, columns = torch.tril_indices(T, T).unbind()
    full[rows, columns] = torch.from_numpy(packed).float()
    return full


def test_the_matrix_of_a_head_is_its_attention_pattern(client: TestClient) -> None:
    for ids in (IDS, IDS[:5], [*IDS[:7], 3]):  # a prefix, and another text, of what is known
        for layer in range(CONFIG.n_layer):
            result = inspect(client, "head", tokens=ids, layer=layer, head=1)
            torch.testing.assert_close(matrix(result), pattern(layer, ids)[1], atol=2e-5, rtol=0)
            assert "".join(result["texts"]) == TOKENIZER.decode(ids)


def test_thumbnails_are_the_largest_weights_of_their_fields(client: TestClient) -> None:
    short = inspect(client, "heads", tokens=IDS[:9])
    assert short["size"] == 9
    got = np.frombuffer(base64.b64decode(short["heads"][2][1]), "u1").reshape(9, 9)
    assert np.abs(got / 255 - pattern(2, IDS[:9])[1].numpy()).max() <= 1 / 255
    ids = (IDS * 6)[: CONFIG.block_size]
    long = inspect(client, "heads", tokens=ids)
    assert long["size"] == 24
    got = np.frombuffer(base64.b64decode(long["heads"][0][0]), "u1").reshape(24, 24) / 255
    whole = pattern(0, ids)[0]
    assert got[-1, 0] == pytest.approx(float(whole[-4:, 0].max()), abs=1 / 255)  # the first token, in the last 4 rows
    assert got[:, 1:].max() == pytest.approx(float(whole[:, 1:].max()), abs=1 / 255)
    assert (got[:, 0].max(), got[0, 5]) == (1, 0)


def test_head_scores_are_those_of_the_function(client: TestClient) -> None:
    result, expected = inspect(client, "head-scores"), head_scores(MODEL)
    for name in ("previous", "duplicate", "induction"):
        assert result[name] == [pytest.approx(row, abs=1e-4) for row in getattr(expected, name).tolist()]


@pytest.mark.parametrize("alternative", [None, 7])
def test_contributions_equal_logit_attribution(client: TestClient, alternative: int | None) -> None:
    for ids in (IDS, IDS[:6]):
        result = inspect(client, "contributions", tokens=ids, target=5, alternative=alternative)
        expected = gpt2.logit_attribution(MODEL, torch.tensor([ids]), 5, alternative)
        assert result["heads"] == [pytest.approx(row, **CLOSE) for row in expected.heads.tolist()]
        for name in ("mlps", "attn_bias"):
            assert result[name] == pytest.approx(getattr(expected, name).tolist(), **CLOSE)
        for name in ("embed", "pos_embed", "bias", "total"):
            assert result[name] == pytest.approx(getattr(expected, name), **CLOSE)


def test_the_lens_map_is_the_lens_at_each_position(client: TestClient) -> None:
    result = inspect(client, "lens-map", tokens=IDS, positions=4, asked=5)
    assert result["first"] == len(IDS) - 4
    assert [token["id"] for token in result["tokens"]] == IDS[-4:]
    assert result["following"] == [*[TOKENIZER.decode([i]) for i in IDS[-3:]], TOKENIZER.decode([5])]
    assert len(result["layers"]) == CONFIG.n_layer + 1
    for at, position in enumerate(range(len(IDS) - 4, len(IDS))):
        asked = [*IDS, 5][position + 1]
        one = inspect(client, "lens", tokens=IDS, position=position, top=1, asked=asked)["layers"]
        cells = [layer[at] for layer in result["layers"]]
        assert [cell[0] for cell in cells] == [layer["tokens"][0]["id"] for layer in one]
        assert [cell[1] for cell in cells] == pytest.approx(
            [layer["tokens"][0]["probability"] for layer in one], abs=2e-5
        )
        assert [cell[2] for cell in cells] == pytest.approx([layer["asked"] for layer in one], abs=2e-5)
        assert result["names"][str(cells[0][0])]["text"] == one[0]["tokens"][0]["text"]


def check_distribution(result: Any, logits: Tensor, asked: int) -> None:
    """The response shows the distribution after an experiment, and how far it is from that of the model."""
    after, before = logits.log_softmax(-1), MODEL(ROW)[0, -1].log_softmax(-1)
    for token in result["tokens"]:
        assert token["probability"] == pytest.approx(float(after[token["id"]].exp()), **CLOSE)
        assert token["raw"] == pytest.approx(float(before[token["id"]].exp()), **CLOSE)
    shown = [token["id"] for token in result["tokens"]]
    assert {int(before.argmax()), int(after.argmax()), asked} <= set(shown)
    assert result["kl"] == pytest.approx(float((before.exp() * (before - after)).sum()) / math.log(2), abs=1e-4)


@pytest.mark.parametrize("mode", ["zero", "mean"])
@torch.no_grad()
def test_ablation_equals_ablate(client: TestClient, mode: str) -> None:
    heads, mlps = [[0, 1], [2, 0]], [1]
    result = inspect(client, "ablate", tokens=IDS, heads=heads, mlps=mlps, mode=mode, asked=5)
    check_distribution(result, gpt2.ablate(MODEL, ROW, [(0, 1), (2, 0)], mlps, mode)[0, -1], 5)
    assert result["kl"] > 1e-4
    assert inspect(client, "ablate", tokens=IDS)["kl"] == pytest.approx(0, abs=1e-5)


@torch.no_grad()
def test_steering_adds_the_difference_of_two_prompts(client: TestClient) -> None:
    name = "blocks.1.hook_resid_pre"

    def last(text: str) -> Tensor:
        return gpt2.trace(MODEL, torch.tensor([TOKENIZER.encode(text)]), [name])[name][0, -1]

    vector = last("a bird") - last("the dog")
    result = inspect(client, "steer", tokens=IDS, plus="a bird", minus="the dog", layer=1, strength=3.5, asked=5)
    check_distribution(result, gpt2.patch(MODEL, ROW, {name: lambda x: x + 3.5 * vector})[0, -1], 5)
    assert result["norm"] == pytest.approx(float(vector.norm()), rel=1e-3)


@pytest.mark.parametrize("part", ["residual", "attention", "mlp"])
@torch.no_grad()
def test_patching_equals_patch(client: TestClient, part: str) -> None:
    other = [*IDS[:4], 9, *IDS[5:-1], 11]
    name = {"residual": "hook_resid_pre", "attention": "hook_attn_out", "mlp": "hook_mlp_out"}[part]
    for layer in range(CONFIG.n_layer):
        result = inspect(client, "patch", tokens=IDS, source=other, layer=layer, part=part)
        target, alternative = result["target"]["id"], result["alternative"]["id"]
        base, source = MODEL(ROW)[0, -1], MODEL(torch.tensor([other]))[0, -1]
        assert (target, alternative) == (int(source.argmax()), int(base.argmax()))
        assert result["base"] == pytest.approx(float(base[target] - base[alternative]), **CLOSE)
        assert result["source"] == pytest.approx(float(source[target] - source[alternative]), **CLOSE)
        full = f"blocks.{layer}.{name}"
        given = gpt2.trace(MODEL, torch.tensor([other]), [full])[full]
        assert result["spans"] == [[at, at + 1] for at in range(4, len(IDS))]
        for (at, _), value in zip(result["spans"], result["values"], strict=True):

            def replace(x: Tensor, at: int = at, given: Tensor = given) -> Tensor:
                return torch.cat([x[:, :at], given[:, at : at + 1], x[:, at + 1 :]], 1)

            logits = gpt2.patch(MODEL, ROW, {full: replace})[0, -1]
            assert value == pytest.approx(float(logits[target] - logits[alternative]), **CLOSE)


def test_patching_of_longer_texts_takes_spans(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2.serve.experiments.MAX_PATCHED_TOKENS", 3 * len(IDS))
    other = [IDS[0], 9, *IDS[2:]]
    result = inspect(client, "patch", tokens=IDS, source=other, layer=0, target=5, alternative=6)
    assert len(result["spans"]) == 3
    assert result["spans"][0][0] == 1
    assert result["spans"][-1][1] == len(IDS)
    assert result["values"][0] == pytest.approx(result["source"], **CLOSE)  # it holds the only difference
    same = inspect(client, "patch", tokens=IDS, source=IDS, layer=0)
    assert (same["spans"], same["values"]) == ([], [])


def test_experiments_have_modules_of_their_own(client: TestClient) -> None:
    inspect(client, "ablate", tokens=IDS, heads=[[0, 0]])
    inspect(client, "steer", tokens=IDS, plus="a", minus="the", layer=0)
    worker = inspect_worker.InspectWorker(create_served_models(MODELS, TOKENIZER, LIMITS))
    own, model = worker.own_model(worker.models["one"]), MODELS["one"]
    assert not {id(module) for module in own.modules()} & {id(module) for module in model.modules()}
    shared = [a.data_ptr() == b.data_ptr() for a, b in zip(own.parameters(), model.parameters(), strict=True)]
    assert all(shared)


def test_requests_of_a_client_that_has_gone_are_not_run() -> None:
    worker = inspect_worker.InspectWorker(create_served_models(MODELS, TOKENIZER, LIMITS))
    body, calls = inspect_worker.InspectRequest(model="one", tokens=IDS), list[Any]()

    class Asked:
        scope: ClassVar = {"gpt2.client": "a"}

        def __init__(self, gone: bool) -> None:
            self._gone = gone

        async def is_disconnected(self) -> bool:
            return self._gone

    async def run(gone: bool) -> Any:
        return await worker.run(Asked(gone), body, lambda *given: calls.append(given))  # pyright: ignore

    async def run_many() -> list[Any]:
        many = [run(False) for _ in range(inspect_worker.MAX_PENDING_OF_CLIENT + 1)]
        return await asyncio.gather(*many, return_exceptions=True)

    with pytest.raises(APIError, match="the client has disconnected"):
        asyncio.run(run(True))
    assert calls == []
    results = asyncio.run(run_many())
    assert [str(result) for result in results if result is not None] == ["too many requests at the same time"]
    assert len(calls) == inspect_worker.MAX_PENDING_OF_CLIENT


def test_an_equal_experiment_is_computed_once(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    counted = lambda *given, **more: calls.append(given) or gpt2.ablate(*given, **more)  # noqa: E731
    monkeypatch.setattr("gpt2.serve.experiments.ablate", counted)
    results = [inspect(client, "ablate", tokens=IDS[:5], heads=[[1, head]]) for head in (0, 1, 0)]
    assert len(calls) == 2
    assert results[0] == results[2] != results[1]


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        ("head", {"tokens": IDS, "layer": 3, "head": 0}, "no head 0 in layer 3: there are 3 layers of 2 heads"),
        ("head", {"tokens": [], "layer": 0, "head": 0}, "the text has no tokens"),
        ("head", {"tokens": [9999], "layer": 0, "head": 0}, "a token outside the model's vocabulary"),
        ("heads", {}, "give either tokens or text"),
        ("contributions", {"tokens": IDS, "target": 9999}, "token 9999 is not in the model's vocabulary"),
        ("contributions", {"tokens": IDS, "target": 1, "alternative": 9999}, "token 9999 is not in the model"),
        ("lens-map", {"tokens": IDS, "positions": 49}, "positions: input should be less than or equal to 48"),
        ("lens-map", {"tokens": IDS, "position": 99}, "there is no position 99"),
        ("ablate", {"tokens": IDS, "heads": [[0, 2]]}, "no head 2 in layer 0"),
        ("ablate", {"tokens": IDS, "heads": [[0]]}, "heads[0]"),
        ("ablate", {"tokens": IDS, "mlps": [3]}, "no head 0 in layer 3"),
        ("ablate", {"tokens": IDS, "mode": "median"}, "mode: input should be 'zero' or 'mean'"),
        ("steer", {"tokens": IDS, "plus": "a", "minus": "b", "layer": 3}, "there is no layer 3: the model has 3"),
        ("steer", {"tokens": IDS, "plus": "z" * 400, "minus": "b", "layer": 1}, "at most 64 tokens"),
        ("steer", {"tokens": IDS, "plus": "z" * 401, "minus": "b", "layer": 1}, "at most 400 characters"),
        ("patch", {"tokens": IDS, "source": IDS[1:], "layer": 0}, "patching takes texts of equal length"),
        ("patch", {"tokens": [1] * 65, "source": [2] * 65, "layer": 0}, f"patching takes at most {MAX_PATCH_TEXT}"),
        ("patch", {"tokens": [1], "source": [9999], "layer": 0}, "a token outside the model's vocabulary"),
    ],
)
def test_invalid_requests_are_explained(client: TestClient, route: str, body: dict[str, Any], message: str) -> None:
    response = client.post(f"/inspect/{route}", json={"model": "one", **body})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
