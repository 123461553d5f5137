"""Dockerfile, compose file, proxies, unit and docs/serving.md: that what they say is so, with the real programs."""

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
    """The address of a `gpt2 serve`, started as docs/serving.md says to behind a proxy."""
    folder = gpt2.save(random_model(CONFIG), BYTE_TOKENIZER, tmp_path_factory.mktemp("runs") / "quickstart")
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {"GPT2_HOME": str(home), "GPT2_API_KEY": KEY, "CXX": "none"}  # it need not be fast
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
    """Where each of the proxies in front of it listens."""
    with run_proxy(request.param, tmp_path_factory.mktemp(request.param), server) as found:
        yield found


def running(server: str) -> int:
    return httpx.get(f"{server}/health").json()["models"]["quickstart"]["running"]


def wait_until_idle(server: str) -> None:
    until = time.monotonic() + 5
    while running(server):
        assert time.monotonic() < until, "a slot is still taken"
        time.sleep(0.01)


def test_a_stream_comes_as_it_is_written_and_ends_with_its_reader(port: int, server: str) -> None:
    with https_client(port, key=KEY) as one:
        with one.stream("POST", "/v1/completions", json=LONG) as reply:
            assert reply.status_code == 200
            lines = reply.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"]
            assert running(server) == 1, "the first piece came when all was written"
        wait_until_idle(server)


def test_limits_are_counted_by_the_clients_own_address(port: int, server: str) -> None:
    first, same, other = (https_client(port, address, KEY) for address in ("127.0.0.2", "127.0.0.2", "127.0.0.3"))
    with first, same, other:
        with first.stream("POST", "/v1/completions", json=LONG) as reply:
            lines = reply.iter_lines()  # which closes the stream when it is thrown away
            next(lines)
            refused = same.post("/v1/completions", json=ONE_TOKEN)
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) >= 1
            lying = {"X-Forwarded-For": "127.0.0.9"}
            assert same.post("/v1/completions", json=ONE_TOKEN, headers=lying).status_code == 429
            assert other.post("/v1/completions", json=ONE_TOKEN).status_code == 200
        wait_until_idle(server)


def test_names_keys_and_origins_pass_through(port: int) -> None:
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


def test_the_name_has_to_be_allowed(server: str) -> None:
    for host, status in ((SITE, 200), ("localhost", 200), ("evil.example", 403)):
        headers = {"Host": host, "Authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{server}/v1/models", headers=headers).status_code == status


def test_a_body_too_large_is_refused_by_the_server_or_before_it(port: int) -> None:
    for size in (4 * 2**20 + 1, *[6_000_000] * 6):
        with https_client(port, key=KEY) as one:
            refused = one.post("/v1/completions", content=b" " * size)
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "request_too_large"
    with https_client(port, key=KEY) as one:
        assert one.get("/health").status_code == 200, "one large request takes the server away from all"


@contextmanager
def plain(limits: Limits) -> Iterator[LiveServer]:
    """A server in this process that is run by torch alone, so that nothing has to be compiled."""
    model = random_model(CONFIG)
    models = {"tiny": create_served_model("tiny", model, model, BYTE_TOKENIZER, limits)}
    app = create_app(models, limits)
    with run_app(app) as address:
        yield LiveServer(address, models, app)


@contextmanager
def two_behind(name: str, limits: Limits, folder: Path) -> Iterator[tuple[LiveServer, LiveServer, int]]:
    with plain(limits) as first, plain(limits) as second, run_proxy(name, folder, first.url, second.url) as found:
        yield first, second, found


@pytest.mark.parametrize("name", PROXIES)
def test_a_server_that_shuts_down_is_passed_over(name: str, tmp_path: Path) -> None:
    with two_behind(name, Limits(slots=2), tmp_path) as (first, second, found), https_client(found) as one:
        first.scheduler.drain()
        time.sleep(2.5 if name == "caddy" else 0)  # until it has asked for the health again
        for _ in range(6):
            assert one.post("/v1/completions", json=ONE_TOKEN).status_code == 200
        second.scheduler.drain()
        assert one.post("/v1/completions", json=ONE_TOKEN).status_code == 503


def test_nginx_passes_on_what_is_refused_by_a_full_server(tmp_path: Path) -> None:
    with (
        two_behind("nginx", Limits(slots=1, per_client=1, max_tokens=10**6), tmp_path) as (_, _, found),
        https_client(found) as one,
        one.stream("POST", "/v1/completions", json=LONG) as reply,
    ):
        lines = reply.iter_lines()
        next(lines)
        for _ in range(4):
            assert one.post("/v1/completions", json=ONE_TOKEN).status_code == 200
        next(lines)


def test_nginx_says_in_openais_form_that_nobody_is_there(tmp_path: Path) -> None:
    with run_proxy("nginx", tmp_path, f"127.0.0.1:{free_port()}") as found, https_client(found) as one:
        reply = one.post("/v1/completions", json=ONE_TOKEN)
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "service_unavailable"


# The guide


def table(header: str) -> list[list[str]]:
    """The cells of the rows under this header, without the marks of code."""
    lines = GUIDE.split(f"\n{header}\n")[1].splitlines()[1:]
    rows = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_of_limits_is_the_codes() -> None:
    rows = table("| flag | by default | |")
    assert rows == [
        [f"--{limit.name.replace('_', '-')}", f"{limit.default:.10g}", limit.metadata["help"]]
        for limit in fields(Limits)
    ]


def test_the_table_of_errors_is_the_codes() -> None:
    rows = table("| status | | what to do |")
    assert [(int(status), about) for status, about, _ in rows] == [
        (status, error["description"].replace("`", "")) for status, error in ERROR_RESPONSES.items()
    ]


def test_the_table_of_metrics_is_what_prometheus_reads() -> None:
    with plain(Limits(slots=2)) as served, served.client() as one:
        one.post("/v1/completions", json=ONE_TOKEN | {"max_tokens": 3})
        told = one.get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", told, re.MULTILINE))
    rows = table("| metric | type | labels | |")
    assert {name: kind for name, kind, _, _ in rows} == {n: k for n, k in kinds.items() if not n.endswith("_created")}
    for name, _, labels, _ in rows:
        found = re.search(rf"^{name}(?:_bucket)?{{(.*?)}} ", told, re.MULTILINE)
        assert found, name
        assert labels.split(", ") == [label for label in re.findall(r'(\w+)="', found[1]) if label != "le"]


def test_every_path_of_the_guide_exists_and_none_of_openais_is_missing() -> None:
    named = {(method, path) for method, path in re.findall(r"`(GET|POST) (/[^`]*)`", GUIDE)}
    routes = {
        (method, route.path.replace(":path", ""))
        for route in (*create_app({}).routes, *playground_router({}).routes)
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    assert named <= routes
    described = {(m.upper(), p) for p, methods in create_app({}).openapi()["paths"].items() for m in methods}
    assert {route for route in described if not route[1].startswith("/inspect")} <= named


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


def test_the_examples_with_curl_work(server: str) -> None:
    (script,) = blocks("sh", "Talk to it")
    environment = os.environ | {"GPT2_API_KEY": KEY}
    require_program("curl")
    shell = ["bash", "-euo", "pipefail", "-c", script.replace("http://127.0.0.1:8000", server)]
    told = subprocess.run(shell, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr + told.stdout
    assert '"finish_reason":' in told.stdout
    assert "data: [DONE]" in told.stdout
    assert '"count":8' in told.stdout


def test_the_examples_with_openais_client_work(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai", reason="the openai client is not installed")
    (script,) = blocks("python", "Talk to it")
    monkeypatch.setenv("GPT2_API_KEY", KEY)
    out = StringIO()
    with redirect_stdout(out):
        exec(replace_once(script, ("http://127.0.0.1:8000", server)), {})
    assert "CompletionUsage(" in out.getvalue()


# Containers and systemd


def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def test_the_compose_file_gives_away_nothing() -> None:
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


def test_the_checks_of_health_tell_a_server_that_takes_requests(server: str) -> None:
    """Of the image and of the compose file: the same, run here against a server that runs and then against none."""
    (line,) = re.findall(r"^ +CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    program, *arguments = json.loads(line)
    assert compose()["services"]["gpt2"]["healthcheck"]["test"] == ["CMD", program, *arguments]
    for port, expected in ((server.rpartition(":")[2], 0), (str(free_port()), 1)):
        command = [sys.executable, *(replace_once(one, ("8000", port)) for one in arguments if one != "-c")]
        command.insert(1, "-c")
        assert subprocess.run(command, capture_output=True, check=False).returncode == expected


def test_the_image_is_made_of_what_it_is_sent() -> None:
    """Every file that the Dockerfile copies from here passes .dockerignore, and exists."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for name in line.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert sorted(copied) == sorted(line[1:] for line in ignored if line.startswith("!"))
    assert "*" in ignored
    assert all((ROOT / name).exists() for name in copied)
    stages = text.split("\nFROM ")
    assert "\nUSER 10001:10001\n" in stages[-1]
    assert stages[-1].endswith('\nENTRYPOINT ["gpt2", "serve", "--host", "0.0.0.0"]\n')


def test_hadolint_finds_nothing() -> None:
    lint = require_program("hadolint")
    told = subprocess.run([lint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout


def test_the_unit_is_one_that_systemd_reads(tmp_path: Path) -> None:
    verify = require_program("systemd-analyze")
    text = (EXAMPLES / "gpt2.service").read_text(encoding="utf-8")
    unit = tmp_path / "gpt2.service"
    unit.write_text(replace_once(text, ("ExecStart=/opt/gpt2/bin/gpt2", f"ExecStart={sys.executable} -m gpt2")))
    told = subprocess.run([verify, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    settings = dict(line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Z]\w+=", line))
    assert int(settings["TimeoutStopSec"]) >= 30 + 10
    assert settings["RestartPreventExitStatus"] == "2"
    assert "GPT2_API_KEY" not in settings["ExecStart"]
