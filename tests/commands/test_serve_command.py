"""`gpt2 serve` as a process: the line when it is ready, what it refuses in one line, and how it ends."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx
import pytest
from torch import nn

from tests.helpers.transformers_reference import random_model

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
import gpt2
from gpt2.lora import LoRAConfig, adapter_state_dict, add_adapter, base_fingerprint, merge_and_unload, save_adapter
from gpt2.serve.models import served_model_name
from gpt2.serve.uvicorn_server import bind_socket, is_loopback
from gpt2.templates import PLAIN_TEMPLATE, ChatTemplate, load_template
from tests.helpers.cli_helpers import run_cli
from tests.helpers.live_server import BYTE_TOKENIZER, CONFIG

STREAM = {"prompt": "x", "stream": True, "temperature": 0.1, "logit_bias": {"256": -100}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(gpt2.save(random_model(CONFIG), BYTE_TOKENIZER, tmp_path_factory.mktemp("model") / "tiny"))


@contextmanager
def process(*argv: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`gpt2 serve ARGV --port 0`, and its address once it is ready."""
    command = [sys.executable, "-m", "gpt2", "serve", *argv, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            line = next((line for line in server.stderr if "compiling" not in line), "")
            found = re.fullmatch(r"gpt2: serving tiny at (http://\S+) \(32 slots, .+ GiB of cache\)\n", line)
            assert found, line
            yield server, found[1]
        finally:
            server.kill()


def test_sigterm_finishes_running_requests_and_refuses_new_ones(folder: str) -> None:
    with process(folder, "--grace", "60", "--log-requests") as (server, url), httpx.Client(base_url=url) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
        with client.stream("POST", "/v1/completions", json=STREAM | {"max_tokens": 1500}, timeout=60) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            server.send_signal(signal.SIGTERM)
            until_draining(url)
            refused = httpx.post(f"{url}/v1/completions", json={"prompt": "secret"})
            assert refused.status_code == 503
            assert "shutting down" in refused.json()["error"]["message"]
            rest = [first, *lines]
        assert rest[-2] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-4]
        assert server.wait(10) == 0
        assert server.stderr is not None
        log = server.stderr.read()
        assert "POST '/v1/completions' 503" in log
        assert "secret" not in log
        assert "Traceback" not in log


def until_draining(url: str) -> None:
    for _ in range(200):
        if httpx.get(f"{url}/health").status_code == 503:
            return
        time.sleep(0.01)
    raise AssertionError("the signal has no effect")


def test_requests_after_the_grace_period_are_cancelled(folder: str) -> None:
    with process(folder, "--grace", "0.2", "--max-tokens", "1000000") as (server, url):
        asked = STREAM | {"max_tokens": 1000000}
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            end = [line for line in lines if line][-2:]
        assert "shutting down" in end[0]
        assert end[1] == "data: [DONE]"
        assert server.wait(15) == 0


def test_a_second_signal_cancels_requests(folder: str) -> None:
    """A streaming client gets an error event, and the log has no traceback."""
    with process(folder, "--grace", "600", "--max-tokens", "1000000") as (server, url):
        asked = STREAM | {"max_tokens": 1000000}
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            until_draining(url)
            server.send_signal(signal.SIGTERM)
            end = [line for line in lines if line][-2:]
        assert "shutting down" in end[0]
        assert end[1] == "data: [DONE]"
        assert server.wait(30) == 0
        assert server.stderr is not None
        assert "Traceback" not in server.stderr.read()


@pytest.mark.slow
def test_a_client_that_reads_nothing_does_not_block_shutdown(folder: str) -> None:
    with process(folder, "--grace", "0.1", "--max-tokens", "1000000") as (server, url):
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps(STREAM | {"max_tokens": 1000000, "logprobs": 20, "n": 4}).encode()
        with socket.socket() as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plain.connect((host, int(port)))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            plain.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            read, before = 0, -1
            while not read == before > 0:  # until no token more goes into what the two sockets hold
                time.sleep(0.5)
                read, before = _generated_tokens(url), read
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        assert server.stderr is not None
        log = server.stderr.read()
        assert "Traceback" not in log
        assert log.count("\n") <= 3


def _generated_tokens(url: str) -> int:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(int(float(line.split()[1])) for line in lines if line.startswith("gpt2_between_tokens_seconds_count"))


def test_a_key_from_the_environment_and_prompts_in_the_log(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_API_KEY", "from-the-environment")
    with process(folder, "--log-prompts") as (server, url):
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "hush"}).status_code == 401
        headers = {"Authorization": "Bearer from-the-environment"}
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "hush"}, headers=headers).status_code == 200
        assert httpx.get(f"{url}/v1/models", headers=headers | {"Host": "evil.example"}).status_code == 403
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0
        assert server.stderr is not None
        log = server.stderr.read()
        assert log.count("hush") == 1
        assert "from-the-environment" not in log


def test_an_adapter_is_served_with_its_model(folder: str, tmp_path: Path) -> None:
    model, config = random_model(CONFIG), LoRAConfig(rank=3)
    base = base_fingerprint(model)
    add_adapter(model, config)
    for tensor in adapter_state_dict(model).values():
        nn.init.normal_(tensor, std=0.3)
    save_adapter(tmp_path / "adapter", config, adapter_state_dict(model), "tiny", base)
    question = {"prompt": "What", "temperature": 0, "max_tokens": 12}
    with process(folder, "--adapter", str(tmp_path / "adapter")) as (_, url):
        text = httpx.post(f"{url}/v1/completions", json=question, timeout=60).json()["choices"][0]["text"]
    adapted = gpt2.generate(merge_and_unload(model), BYTE_TOKENIZER, "What", max_new_tokens=12, temperature=0)[0]
    assert (
        "What" + text
        == adapted
        != gpt2.generate(random_model(CONFIG), BYTE_TOKENIZER, "What", max_new_tokens=12, temperature=0)[0]
    )


def test_localhost_is_reached_at_both_addresses(folder: str) -> None:
    """Also at 127.0.0.1 where the name localhost means ::1 first."""
    flags = ["--host", "localhost", "--model-alias", "gpt-3.5-turbo=tiny", "--allowed-origins", "https://chat.example"]
    with process(folder, *flags) as (_, url):
        port = url.rpartition(":")[2]
        with bind_socket("::1", 0) if socket.has_ipv6 else nullcontext() as ipv6:
            hosts = ["127.0.0.1", "[::1]"] if ipv6 else ["127.0.0.1"]
        for host in hosts:
            reply = httpx.get(f"http://{host}:{port}/v1/models", headers={"Origin": "https://chat.example"})
            assert [model["id"] for model in reply.json()["data"]] == ["tiny", "gpt-3.5-turbo"]
            assert reply.headers["access-control-allow-origin"] == "https://chat.example"


def test_a_port_in_use_is_one_line(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, out, err = run_cli(capsys, "serve", folder, "--port", port)
    assert (code, out) == (2, "")
    assert err == f"gpt2: port {port} on 127.0.0.1 is in use; choose another --port, or 0 for a free one\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], r"--host 0.0.0.0 is open to other machines: set \$GPT2_API_KEY, or give --api-key"),
        (["--host", "::"], r"--host :: is open to other machines"),
        (["--api-key", ""], r"--api-key is empty"),
        (["--api-key", "ä"], r"an API key must have only printable ASCII"),
        (["--api-key", "a", "--no-api-key"], r"exclude each other"),
        (["--port", "70000"], r"--port must be 0 to 65535, not 70000"),
        (["--host", "no.such.host.invalid", "--no-api-key"], r"--host no.such.host.invalid .*there is no such address"),
        (["--slots", "0"], r"slots must be at least 1, not 0"),
        (["--timeout", "nan"], r"timeout must be at least 1, not nan"),
        (["--model-alias", "a"], r"--model-alias must be ALIAS=NAME, not a"),
        (["--model-alias", "a=tinny"], r"no model has the name 'tinny' \(did you mean 'tiny'\?\)"),
        (["--model-alias", "tiny=tiny"], r"the name 'tiny' is taken"),
        (["--allowed-origins", "chat.example"], r"--allowed-origins chat.example: an origin has a scheme and a host"),
        (["--context", "0"], r"--context must be at least 1"),
        (["--dtype", "int5"], r"dtype 'int5' is not one of .*did you mean 'int"),
        (["--slot", "1"], r"there is no --slot \(did you mean '--slots'\?\)"),
    ],
)
def test_invalid_flags_are_one_line(
    folder: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPT2_API_KEY", raising=False)
    code, out, err = run_cli(capsys, "serve", folder, "--port", "0", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err)


def test_two_models_with_one_name_are_refused(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_cli(capsys, "serve", folder, folder, "--port", "0")
    assert (code, err) == (2, "gpt2: two models have the name tiny: names must be different\n")


def test_a_bad_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_cli(capsys, "serve", str(tmp_path), "--port", "0")
    assert (code, out) == (2, "")
    assert err.startswith(f"gpt2: {tmp_path} is no model folder")


def test_a_missing_extra_names_the_pip_install(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = run_cli(capsys, "serve", folder)
    assert (code, err) == (
        2,
        "gpt2: gpt2 serve needs uvicorn, which is not installed: pip install 'plain-gpt2[serve]'\n",
    )


def test_names_of_models_and_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    assert (
        served_model_name(str(tmp_path / "run"))
        == served_model_name(str(tmp_path / "run" / "model"))
        == served_model_name(".")
        == "run"
    )
    assert served_model_name("openai-community/gpt2") == "openai-community/gpt2"
    assert [is_loopback(host) for host in ("localhost", "127.0.0.2", "::1", "[::1]")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "example.com", "localhost.example.com")] == [False] * 4
    with bind_socket("127.0.0.1", 0) as bound:
        assert bound.getsockname()[1] > 0


def test_a_model_is_named_after_its_folder_or_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert served_model_name(str(tmp_path / "run" / "model")) == served_model_name(str(tmp_path / "run")) == "run"
    assert served_model_name("openai-community/gpt2") == "openai-community/gpt2"
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert served_model_name("/model") == "model"


def test_templates_are_read_from_the_folder(tmp_path: Path) -> None:
    assert (load_template(tmp_path) or ChatTemplate()).source == PLAIN_TEMPLATE
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        '{"chat_template": [{"name": "default", "template": "A{{ eos_token }}"}], "eos_token": {"content": "E"}}'
    )
    assert (load_template(tmp_path) or ChatTemplate()).render_prompt([("user", "x")]) == "AE"
    (tmp_path / "chat_template.jinja").write_text("B{{ messages[0].content }}")
    assert (load_template(tmp_path) or ChatTemplate()).render_prompt([("user", "x")]) == "Bx"
    for broken in ("{% if %}", "{{ messages"):
        (tmp_path / "chat_template.jinja").write_text(broken)
        with pytest.raises(gpt2.UserError, match="chat template"):
            load_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text("{")
    with pytest.raises(gpt2.UserError, match="chat template"):
        load_template(tmp_path)
