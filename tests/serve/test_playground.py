"""What the playground asks the server, over HTTP: the answers are those of `gpt2.serve.inspect`."""

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


def ask(client: TestClient, what: str, **question: Any) -> Any:
    answer = client.post(f"/inspect/{what}", json={"model": "one", **question})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_page_and_its_parts_need_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    names = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert {"static/playground.js", "static/playground.css"} <= set(names)
    for name in names:
        assert client.get(f"/{name}").status_code == 200, name
    found, asked = {"playground.js"}, set()
    while unseen := found - asked:
        asked |= unseen
        for name in unseen:
            script = client.get(f"/static/{name}")
            assert script.headers["content-type"].startswith("text/javascript"), name
            assert len(script.text.splitlines()) < 300, name
            found |= set(re.findall(r'from "\./([^"]+)"', script.text))
    assert found == {path.name for path in STATIC.glob("*.js")}
    for style in (r"<script>", r"\sstyle=", r"\son\w+=", r"https?://"):
        assert not re.search(style, page.text)


@pytest.mark.parametrize("name", ["nothing.js", "..%2Finspect.py", "%2e%2e/inspect.py", "../playground.py"])
def test_nothing_else_is_given_out(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{name}").status_code == 404


def test_answers_are_those_of_the_functions(client: TestClient) -> None:
    ids = TOKENIZER.encode(PROMPT)
    shape = client.get("/inspect/models").json()["models"][0]
    assert (shape["name"], shape["n_layer"], shape["end_of_text"]) == ("one", 3, TOKENIZER.end_of_text)

    scored = score_tokens(MODELS["one"], TOKENIZER, ids)
    told = ask(client, "score", text=PROMPT)
    assert told == ask(client, "score", tokens=ids)
    assert [token["logprob"] for token in told["tokens"]] == [None, *(token.logprob for token in scored)]
    assert "".join(token["text"] for token in told["tokens"]) == PROMPT
    assert told["perplexity"] == perplexity(scored)

    told = ask(client, "attention", tokens=ids, position=2)
    assert told["position"] == 2
    assert told["weights"] == [[pytest.approx(row, abs=1e-5) for row in layer] for layer in attended(ids, 2)]
    told = ask(client, "lens", tokens=ids, asked=5)
    layers = logit_lens(MODELS["one"], TOKENIZER, ids, len(ids) - 1, 5, 5)
    assert [layer["asked"] for layer in told["layers"]] == [layer.asked for layer in layers]
    assert [token["id"] for token in told["layers"][1]["tokens"]] == [i for i, _, _ in layers[1].tokens]


def attended(ids: list[int], position: int) -> list[Any]:
    return attention_weights(MODELS["one"], ids, position).tolist()


def test_settings_change_the_chances(client: TestClient) -> None:
    plain = ask(client, "next", text=PROMPT, top=5)
    assert len(plain["tokens"]) == 5
    assert all(token["probability"] == pytest.approx(token["raw"], rel=1e-5) for token in plain["tokens"])
    greedy = ask(client, "next", text=PROMPT, top=5, temperature=0)
    assert [token["probability"] for token in greedy["tokens"]] == [1, 0, 0, 0, 0]
    assert greedy["kept"] == 1
    assert greedy["entropy"] == 0
    first, second = (token["id"] for token in plain["tokens"][:2])
    for ban in ({"logit_bias": {str(first): -1000}}, {"bad_words": [[first]]}):
        banned = ask(client, "next", text=PROMPT, asked=first, **ban)
        assert banned["tokens"][0]["id"] == second
        assert banned["asked"]["probability"] == 0


def test_a_score_tells_where_each_token_begins(client: TestClient) -> None:
    text = "the cat 😀 sat"
    told = ask(client, "score", text=text)["tokens"]
    assert [token["start"] for token in told if "\ufffd" not in token["text"]] == [
        token["start"] for token in told if text.startswith(token["text"], token["start"])
    ]
    assert [token["start"] for token in told] == sorted(token["start"] for token in told)
    assert text[told[-1]["start"] :] == told[-1]["text"]


def test_an_empty_text_begins_one(client: TestClient) -> None:
    assert ask(client, "next", text="") == ask(client, "next", tokens=[TOKENIZER.end_of_text])
    assert ask(client, "score", text="") == {"tokens": [], "perplexity": None, "count": 0}


def test_a_long_text_is_looked_at_by_its_end(client: TestClient) -> None:
    ids = TOKENIZER.encode("the dog ran " * 60)
    told = ask(client, "attention", tokens=ids)
    assert told["start"] == len(ids) - CONFIG.block_size
    assert told["position"] == len(ids) - 1
    assert len(told["weights"][0][0]) == len(told["texts"]) == CONFIG.block_size


@pytest.mark.parametrize(
    ("what", "question", "status", "message"),
    [
        ("next", {"text": "a", "model": "on"}, 404, "there is no model 'on' (did you mean 'one'?)"),
        ("next", {"text": "a", "model": None}, 400, "which model? There are one, two"),
        ("next", {"text": "a", "top_p": 3.0}, 400, "top_p: input should be less than or equal to 1"),
        ("next", {"text": "a", "asked": 9999}, 400, "token 9999 is not in the model's vocabulary"),
        ("next", {"text": "a", "tpo": 3}, 400, "there is no field 'tpo'"),
        ("score", {}, 400, "a question needs tokens or text, and not both"),
        ("score", {"tokens": [9999]}, 400, "the text has a token outside the model's vocabulary"),
        ("score", {"text": "a " * 20_000}, 400, "are more than the 16384 that are looked at"),
        ("attention", {"tokens": [1, 2], "position": 2}, 400, "there is no position 2 in a text of 2 tokens"),
        ("lens", {"tokens": []}, 400, "there is no position -1 in a text of 0 tokens"),
        ("lens", {"tokens": [1], "top": 0}, 400, "top: input should be greater than or equal to 1"),
    ],
)
def test_mistakes_are_told_in_one_line(
    client: TestClient, what: str, question: dict[str, Any], status: int, message: str
) -> None:
    answer = client.post(f"/inspect/{what}", json={"model": "one", **question})
    assert answer.status_code == status
    told = answer.json()["error"]
    assert message in told["message"]
    assert set(told) == {"message", "type", "param", "code"}
