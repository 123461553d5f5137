"""Dockerfile, compose file, proxies, systemd unit and docs/serving.md, checked with the real programs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.transformers_reference import random_model

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
from starlette.routing import Route

import gpt2
from gpt2.serve.app import ERROR_RESPONSES, create_app
from gpt2.serve.limits import Limits
from gpt2.serve.models import create_served_model
from gpt2.serve.playground import playground_router
from tests.helpers.cli_helpers import run_cli
from tests.helpers.live_server import BYTE_TOKENIZER, CONFIG, LiveServer, run_app
from tests.helpers.proxies import (
    EXAMPLES,
    PROXIES,
    SITE,
    free_port,
    https_client,
    replace_once,
    require_program,
    run_proxy,
)

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
KEY = "key-of-the-test"
ONE_TOKEN = {"prompt": "x", "max_tokens": 1}
LONG = {"prompt": "x", "max_tokens": 10**6, "logit_bias": {"256": -100}, "stream": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a `gpt2 serve` process, started as docs/serving.md describes for use behind a proxy."""
    folder = gpt2.save(random_model(CONFIG), BYTE_TOKENIZER, tmp_path_factory.mktemp("runs") / "quickstart")
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {
        "GPT2_HOME": str(home),
        "GPT2_API_KEY": KEY,
        "CXX": "none",
    }  # without the compiled kernel, which takes time to build
    flags = ["--trusted-proxy", "127.0.0.1", "--allowed-host", SITE, "--per-client", "1"]
    command = [sys.executable, "-m", "gpt2", "serve", folder, *flags, "--max-tokens", "1000000", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            found = re.search(r"http://\S+", next((line for line in process.stderr if "serving" in line), ""))
            assert found
            yield found[0]
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module", params=PROXIES)
def port(request: pytest.FixtureRequest, server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of each proxy in front of the server."""
    with run_proxy(request.param, tmp_path_factory.mktemp(request.param), server) as found:
        yield found


def running(server: str) -> int:
    return httpx.get(f"{server}/health").json()["models"]["quickstart"]["running"]


def wait_until_idle(server: str) -> None:
    until = time.monotonic() + 5
    while running(server):
        assert time.monotonic() < until, "a slot is still taken"
        time.sleep(0.01)


def test_proxies_pass_on_streams_and_disconnects(port: int, server: str) -> None:
    with https_client(port, key=KEY) as one:
        with one.stream("POST", "/v1/completions", json=LONG) as reply:
            assert reply.status_code == 200
            lines = reply.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"]
            assert running(server) == 1, "the proxy buffered the stream"
        wait_until_idle(server)


def test_limits_count_the_address_of_the_client(port: int, server: str) -> None:
    first, same, other = (https_client(port, address, KEY) for address in ("127.0.0.2", "127.0.0.2", "127.0.0.3"))
    with first, same, other:
        with first.stream("POST", "/v1/completions", json=LONG) as reply:
            lines = reply.iter_lines()  # kept, because its deletion closes the stream
            next(lines)
            refused = same.post("/v1/completions", json=ONE_TOKEN)
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) >= 1
            forged = {"X-Forwarded-For": "127.0.0.9"}
            assert same.post("/v1/completions", json=ONE_TOKEN, headers=forged).status_code == 429
            assert other.post("/v1/completions", json=ONE_TOKEN).status_code == 200
        wait_until_idle(server)


def test_proxies_pass_on_hosts_keys_and_origins(port: int) -> None:
    with https_client(port, key=KEY) as one:
        assert one.get("/v1/models").json()["data"][0]["id"] == "quickstart"
        mine, theirs = {"Origin": f"https://{SITE}:{port}"}, {"Origin": "https://evil.example"}
        assert one.post("/tokenize", json={"text": "x"}, headers=mine).status_code == 200
        assert one.post("/tokenize", json={"text": "x"}, headers=theirs).status_code == 403
        assert one.get("/metrics").status_code == 404
        page = one.get("/")
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    with https_client(port, key="wrong") as one:
        assert one.get("/v1/models").status_code == 401


def test_host_names_must_be_allowed(server: str) -> None:
    for host, status in ((SITE, 200), ("localhost", 200), ("evil.example", 403)):
        headers = {"Host": host, "Authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{server}/v1/models", headers=headers).status_code == status


def test_large_bodies_are_refused_by_the_server_or_the_proxy(port: int) -> None:
    for size in (4 * 2**20 + 1, *[6_000_000] * 6):
        with https_client(port, key=KEY) as one:
            refused = one.post("/v1/completions", content=b" " * size)
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "request_too_large"
    with https_client(port, key=KEY) as one:
        assert one.get("/health").status_code == 200, "the proxy has marked the server as down"


@contextmanager
def torch_server(limits: Limits) -> Iterator[LiveServer]:
    """A server in this process that runs the model with torch, so no kernel is compiled."""
    model = random_model(CONFIG)
    models = {"tiny": create_served_model("tiny", model, model, BYTE_TOKENIZER, limits)}
    app = create_app(models, limits)
    with run_app(app) as address:
        yield LiveServer(address, models, app)


@contextmanager
def two_servers_behind(name: str, limits: Limits, folder: Path) -> Iterator[tuple[LiveServer, LiveServer, int]]:
    with (
        torch_server(limits) as first,
        torch_server(limits) as second,
        run_proxy(name, folder, first.url, second.url) as found,
    ):
        yield first, second, found


@pytest.mark.parametrize("name", PROXIES)
def test_a_draining_server_gets_no_requests(name: str, tmp_path: Path) -> None:
    with two_servers_behind(name, Limits(slots=2), tmp_path) as (first, second, found), https_client(found) as one:
        first.scheduler.drain()
        time.sleep(2.5 if name == "caddy" else 0)  # until its next health check
        for _ in range(6):
            assert one.post("/v1/completions", json=ONE_TOKEN).status_code == 200
        second.scheduler.drain()
        assert one.post("/v1/completions", json=ONE_TOKEN).status_code == 503


def test_nginx_retries_requests_that_a_full_server_refuses(tmp_path: Path) -> None:
    with (
        two_servers_behind("nginx", Limits(slots=1, per_client=1, max_tokens=10**6), tmp_path) as (_, _, found),
        https_client(found) as one,
        one.stream("POST", "/v1/completions", json=LONG) as reply,
    ):
        lines = reply.iter_lines()
        next(lines)
        for _ in range(4):
            assert one.post("/v1/completions", json=ONE_TOKEN).status_code == 200
        next(lines)


def test_nginx_sends_the_error_body_when_no_server_is_up(tmp_path: Path) -> None:
    with run_proxy("nginx", tmp_path, f"127.0.0.1:{free_port()}") as found, https_client(found) as one:
        reply = one.post("/v1/completions", json=ONE_TOKEN)
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "service_unavailable"


# docs/serving.md


def table(header: str) -> list[list[str]]:
    """The cells of the table with this header, without backquotes."""
    lines = GUIDE.split(f"\n{header}\n")[1].splitlines()[1:]
    rows = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_of_limits_equals_the_code() -> None:
    rows = table("| flag | default | |")
    assert rows == [
        [f"--{limit.name.replace('_', '-')}", format_default(limit.name, limit.default), limit.metadata["help"]]
        for limit in fields(Limits)
    ]


def format_default(name: str, value: Any) -> str:
    return f"{value / 2**20:g} MiB" if name == "max_body" else f"{value:.10g}"


def test_the_table_of_errors_equals_the_code() -> None:
    rows = table("| status | | what to do |")
    assert [(int(status), description) for status, description, _ in rows] == [
        (status, error["description"].replace("`", "")) for status, error in ERROR_RESPONSES.items()
    ]


def test_the_table_of_metrics_equals_the_endpoint() -> None:
    with torch_server(Limits(slots=2)) as served, served.client() as one:
        one.post("/v1/completions", json=ONE_TOKEN | {"max_tokens": 40, "ignore_eos": True})
        text = one.get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    rows = table("| metric | type | labels | |")
    assert {name: kind for name, kind, _, _ in rows} == {n: k for n, k in kinds.items() if not n.endswith("_created")}
    for name, _, labels, _ in rows:
        found = re.search(rf"^{name}(?:_bucket)?{{(.*?)}} ", text, re.MULTILINE)
        assert found, name
        assert labels.split(", ") == [label for label in re.findall(r'(\w+)="', found[1]) if label != "le"]


def test_every_path_of_the_guide_exists_and_every_route_is_documented() -> None:
    named = {(method, path) for method, path in re.findall(r"`(GET|POST) (/[^`]*)`", GUIDE)}
    routes = {
        (method, route.path.replace(":path", ""))
        for route in (*create_app({}).routes, *playground_router({}).routes)
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    assert named <= routes
    described = {(m.upper(), p) for p, methods in create_app({}).openapi()["paths"].items() for m in methods}
    assert described <= named


def test_every_flag_of_the_guide_and_the_examples_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = set(re.findall(r"--[a-z-]+", run_cli(capsys, "serve", "--help")[1]))
    named = set(re.findall(r"`(--[a-z-]+)[^`]*`", GUIDE)) - FLAGS_OF_DOCKER
    texts = [GUIDE, *(path.read_text(encoding="utf-8") for path in (ROOT / "Dockerfile", *EXAMPLES.iterdir()))]
    for text in texts:
        for line in re.findall(r"gpt2\"?,? \"?serve(.*)", text):
            named |= set(re.findall(r"--[a-z-]+", line))
    named |= {word for word in compose()["services"]["gpt2"]["command"] if word.startswith("--")}
    assert named - known == set()
    assert {"--host", "--trusted-proxy", "--allowed-host", "--grace"} <= named


FLAGS_OF_DOCKER = {"--user", "--init", "--cpus", "--gpus", "--build-arg"}


def blocks(language: str, heading: str) -> list[str]:
    """The code under a heading."""
    section = GUIDE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def test_the_curl_examples_work(server: str) -> None:
    (script,) = blocks("sh", "Send requests")
    environment = os.environ | {"GPT2_API_KEY": KEY}
    require_program("curl")
    shell = ["bash", "-euo", "pipefail", "-c", script.replace("http://127.0.0.1:8000", server)]
    result = subprocess.run(shell, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr + result.stdout
    assert '"finish_reason":' in result.stdout
    assert "data: [DONE]" in result.stdout
    assert '"count":8' in result.stdout


def test_the_openai_examples_work(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai", reason="the openai client is not installed")
    (script,) = blocks("python", "Send requests")
    monkeypatch.setenv("GPT2_API_KEY", KEY)
    out = StringIO()
    with redirect_stdout(out):
        exec(replace_once(script, ("http://127.0.0.1:8000", server)), {})
    assert "CompletionUsage(" in out.getvalue()


# Containers and systemd


def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def test_the_compose_file_is_hardened() -> None:
    services = compose()["services"]
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert {"mem_limit", "pids_limit", "restart"} <= service.keys()
        assert not service.get("privileged")
    ours, theirs = services["gpt2"], services["proxy"]
    assert ours["environment"]["GPT2_API_KEY"].startswith("${GPT2_API_KEY:?")
    assert [port.split(":")[0] for port in ours["ports"]] == ["127.0.0.1"]
    assert all(port.startswith("${GPT2_LISTEN:-127.0.0.1}:") for port in theirs["ports"])
    assert theirs["cap_add"] == ["NET_BIND_SERVICE"]
    assert "cap_add" not in ours
    assert "./examples/Caddyfile:/etc/caddy/Caddyfile:ro" in theirs["volumes"]
    assert any(volume.endswith(":/models:ro") for volume in ours["volumes"])
    command = ours["command"]
    assert command[command.index("--trusted-proxy") + 1] == theirs["networks"]["default"]["ipv4_address"]
    grace = float(command[command.index("--grace") + 1])
    assert float(ours["stop_grace_period"].removesuffix("s")) >= grace + 10
    assert ours["init"] is True


def test_health_checks_of_the_image(server: str) -> None:
    """The image and the compose file have the same check. It passes for a running server, and fails without one."""
    (line,) = re.findall(r"^ +CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    program, *arguments = json.loads(line)
    assert compose()["services"]["gpt2"]["healthcheck"]["test"] == ["CMD", program, *arguments]
    for port, expected in ((server.rpartition(":")[2], 0), (str(free_port()), 1)):
        command = [sys.executable, *(replace_once(one, ("8000", port)) for one in arguments if one != "-c")]
        command.insert(1, "-c")
        assert subprocess.run(command, capture_output=True, check=False).returncode == expected


def test_the_image_copies_files_that_exist_and_are_not_ignored() -> None:
    """Every file that the Dockerfile copies exists and passes .dockerignore."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for name in line.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert sorted(copied) == sorted(line[1:] for line in ignored if line.startswith("!"))
    assert "*" in ignored
    assert all((ROOT / name).exists() for name in copied)
    stages = text.split("\nFROM ")
    assert "\nUSER 10001:10001\n" in stages[-1]
    assert stages[-1].endswith('\nENTRYPOINT ["gpt2", "serve", "--host", "0.0.0.0"]\n')


def test_hadolint_has_no_complaints() -> None:
    lint = require_program("hadolint")
    result = subprocess.run([lint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    verify = require_program("systemd-analyze")
    text = (EXAMPLES / "gpt2.service").read_text(encoding="utf-8")
    unit = tmp_path / "gpt2.service"
    unit.write_text(replace_once(text, ("ExecStart=/opt/gpt2/bin/gpt2", f"ExecStart={sys.executable} -m gpt2")))
    result = subprocess.run([verify, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    settings = dict(line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Z]\w+=", line))
    assert int(settings["TimeoutStopSec"]) >= 30 + 10
    assert settings["RestartPreventExitStatus"] == "2"
    assert "GPT2_API_KEY" not in settings["ExecStart"]
