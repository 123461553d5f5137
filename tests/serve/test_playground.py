"""The routes of the playground over HTTP: their responses equal the functions of `gpt2.serve.inspect`."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from gpt2.serve.app import create_app
from gpt2.serve.inspect import attention_weights, logit_lens, perplexity, score_tokens
from gpt2.serve.playground import STATIC
from tests.helpers.playground_browser import CONFIG, LIMITS, MODELS, PROMPT, TOKENIZER, create_served_models


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(
        create_app(create_served_models(MODELS, TOKENIZER, LIMITS), LIMITS), base_url="http://127.0.0.1"
    ) as client:
        yield client


def inspect(client: TestClient, route: str, **body: Any) -> Any:
    response = client.post(f"/inspect/{route}", json={"model": "one", **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_the_page_loads_only_its_own_files(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    names = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert {"static/playground.js", "static/playground.css"} <= set(names)
    for name in names:
        assert client.get(f"/{name}").status_code == 200, name
    found, loaded = {"playground.js"}, set()
    while unseen := found - loaded:
        loaded |= unseen
        for name in unseen:
            script = client.get(f"/static/{name}")
            assert script.headers["content-type"].startswith("text/javascript"), name
            assert len(script.text.splitlines()) < 300, name
            found |= set(re.findall(r'from "\./([^"]+)"', script.text))
    assert found == {path.name for path in STATIC.glob("*.js")}
    for forbidden in (r"<script>", r"\sstyle=", r"\son\w+=", r"https?://"):
        assert not re.search(forbidden, page.text)


@pytest.mark.parametrize("name", ["nothing.js", "..%2Finspect.py", "%2e%2e/inspect.py", "../playground.py"])
def test_other_files_are_not_served(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{name}").status_code == 404


def test_responses_equal_the_inspect_functions(client: TestClient) -> None:
    ids = TOKENIZER.encode(PROMPT)
    shape = client.get("/inspect/models").json()["models"][0]
    assert (shape["name"], shape["n_layer"], shape["end_of_text"]) == ("one", 3, TOKENIZER.end_of_text)

    scored = score_tokens(MODELS["one"], TOKENIZER, ids)
    result = inspect(client, "score", text=PROMPT)
    assert result == inspect(client, "score", tokens=ids)
    assert [token["logprob"] for token in result["tokens"]] == [None, *(token.logprob for token in scored)]
    assert "".join(token["text"] for token in result["tokens"]) == PROMPT
    assert result["perplexity"] == perplexity(scored)

    result = inspect(client, "attention", tokens=ids, position=2)
    assert result["position"] == 2
    assert result["weights"] == [[pytest.approx(row, abs=1e-5) for row in layer] for layer in attention(ids, 2)]
    result = inspect(client, "lens", tokens=ids, asked=5)
    layers = logit_lens(MODELS["one"], TOKENIZER, ids, len(ids) - 1, 5, 5)
    assert [layer["asked"] for layer in result["layers"]] == [layer.asked for layer in layers]
    assert [token["id"] for token in result["layers"][1]["tokens"]] == [token.id for token in layers[1].tokens]


def attention(ids: list[int], position: int) -> list[Any]:
    return attention_weights(MODELS["one"], ids, position).tolist()


def test_sampling_parameters_change_the_probabilities(client: TestClient) -> None:
    plain = inspect(client, "next", text=PROMPT, top=5, top_k=0)  # by default the 50 most likely tokens are kept
    assert len(plain["tokens"]) == 5
    assert all(token["probability"] == pytest.approx(token["raw"], rel=1e-5) for token in plain["tokens"])
    greedy = inspect(client, "next", text=PROMPT, top=5, temperature=0)
    assert [token["probability"] for token in greedy["tokens"]] == [1, 0, 0, 0, 0]
    assert greedy["kept"] == 1
    assert greedy["entropy"] == 0
    first, second = (token["id"] for token in plain["tokens"][:2])
    for ban in ({"logit_bias": {str(first): -1000}}, {"bad_words": [[first]]}):
        banned = inspect(client, "next", text=PROMPT, asked=first, **ban)
        assert banned["tokens"][0]["id"] == second
        assert banned["asked"]["probability"] == 0


def test_scores_have_the_offset_of_each_token(client: TestClient) -> None:
    text = "the cat 😀 sat"
    result = inspect(client, "score", text=text)["tokens"]
    assert [token["start"] for token in result if "\ufffd" not in token["text"]] == [
        token["start"] for token in result if text.startswith(token["text"], token["start"])
    ]
    assert [token["start"] for token in result] == sorted(token["start"] for token in result)
    assert text[result[-1]["start"] :] == result[-1]["text"]


def test_an_empty_text_is_the_end_of_text_token(client: TestClient) -> None:
    assert inspect(client, "next", text="") == inspect(client, "next", tokens=[TOKENIZER.end_of_text])
    assert inspect(client, "score", text="") == {"tokens": [], "perplexity": None, "count": 0}


def test_attention_of_a_long_text_covers_its_end(client: TestClient) -> None:
    ids = TOKENIZER.encode("the dog ran " * 60)
    result = inspect(client, "attention", tokens=ids)
    assert result["start"] == len(ids) - CONFIG.block_size
    assert result["position"] == len(ids) - 1
    assert len(result["weights"][0][0]) == len(result["texts"]) == CONFIG.block_size


@pytest.mark.parametrize(
    ("route", "body", "status", "message"),
    [
        ("next", {"text": "a", "model": "on"}, 404, "the model 'on' does not exist (did you mean 'one'?)"),
        ("next", {"text": "a", "model": None}, 400, "model is required: there are one, two"),
        ("next", {"text": "a", "top_p": 3.0}, 400, "top_p: input should be less than or equal to 1"),
        ("next", {"text": "a", "asked": 9999}, 400, "token 9999 is not in the model's vocabulary"),
        ("next", {"text": "a", "tpo": 3}, 400, "there is no field 'tpo'"),
        ("score", {}, 400, "give either tokens or text"),
        ("score", {"tokens": [9999]}, 400, "the text has a token outside the model's vocabulary"),
        ("score", {"text": "a " * 20_000}, 400, "at most 16384 can be inspected"),
        ("attention", {"tokens": [1, 2], "position": 2}, 400, "there is no position 2 in a text of 2 tokens"),
        ("lens", {"tokens": []}, 400, "there is no position -1 in a text of 0 tokens"),
        ("lens", {"tokens": [1], "top": 0}, 400, "top: input should be greater than or equal to 1"),
    ],
)
def test_invalid_requests_get_an_error_response(
    client: TestClient, route: str, body: dict[str, Any], status: int, message: str
) -> None:
    response = client.post(f"/inspect/{route}", json={"model": "one", **body})
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
