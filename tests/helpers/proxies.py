"""nginx and Caddy with the configurations of examples/, and clients with other addresses."""

import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SITE = "gpt2.example"


def free_port() -> int:
    """A port that is free at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def require_program(name: str) -> str:
    """The path of a program; skips the test if it is not installed."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def replace_once(text: str, *pairs: tuple[str, str]) -> str:
    """The text with each `old` replaced, which must occur exactly once."""
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def nginx_command(folder: Path, port: int, upstreams: list[str]) -> list[str]:
    """The command that runs examples/nginx.conf on this port, with a new certificate."""
    certificate, key = folder / "fullchain.pem", folder / "privkey.pem"
    make = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=gpt2",
    ]
    subprocess.run(
        [require_program("openssl"), *make, "-keyout", key, "-out", certificate], check=True, capture_output=True
    )
    text = replace_once(
        (EXAMPLES / "nginx.conf").read_text(encoding="utf-8"),
        ("    server 127.0.0.1:8000 max_fails=0;", "".join(f"server {one} max_fails=0;" for one in upstreams)),
        ("listen 80;", f"listen 127.0.0.1:{free_port()};"),
        ("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        ("/etc/ssl/gpt2/fullchain.pem", str(certificate)),
        ("/etc/ssl/gpt2/privkey.pem", str(key)),
    )
    (folder / "gpt2.conf").write_text(text)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"{'user root;' if os.geteuid() == 0 else ''} daemon off; pid {folder}/pid; events {{}}\n"
        f"http {{ access_log off; {temporary} include {folder}/gpt2.conf; }}"
    )
    command = [require_program("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "warn" not in checked.stderr
    return command


def caddy_command(folder: Path, port: int, upstreams: list[str]) -> list[str]:
    """The command that runs examples/Caddyfile on this port; Caddy creates the certificate."""
    text = replace_once(
        (EXAMPLES / "Caddyfile").read_text(encoding="utf-8"),
        ("{$GPT2_SITE:localhost} {", f"{SITE}:{port} {{\n\tbind 127.0.0.1\n\ttls internal"),
        ("{$GPT2_UPSTREAMS:127.0.0.1:8000}", " ".join(upstreams)),
    )
    settings = f"admin off\n\tskip_install_trust\n\tauto_https disable_redirects\n\tstorage file_system {folder}/data"
    (folder / "Caddyfile").write_text(f"{{\n\t{settings}\n}}\n{text}")
    return [require_program("caddy"), "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


PROXIES: dict[str, Callable[[Path, int, list[str]], list[str]]] = {"nginx": nginx_command, "caddy": caddy_command}


@contextmanager
def run_proxy(name: str, folder: Path, *upstreams: str) -> Iterator[int]:
    """Run a proxy in front of servers at these addresses; its port."""
    port = free_port()
    command = PROXIES[name](folder, port, [address.removeprefix("http://") for address in upstreams])
    log, environment = folder / "log", {"HOME": str(folder), "PATH": "/usr/bin:/bin"}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            wait_until_ready(port, process, log)
            yield port
        finally:
            process.terminate()
            process.wait(10)


def wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the proxy responds."""
    until = time.monotonic() + 15
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        try:
            with https_client(port) as one:
                one.get("/health")
                return
        except httpx.TransportError:
            time.sleep(0.02)


class _SNITransport(httpx.HTTPTransport):
    """Sends the name of the site in the TLS handshake (SNI) as well."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions["sni_hostname"] = SITE
        return super().handle_request(request)


def https_client(port: int, address: str = "127.0.0.1", key: str = "") -> httpx.Client:
    """A client with this local address that accepts any certificate, since those of the proxies are self-signed."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    headers = {"Host": f"{SITE}:{port}"} | ({"Authorization": f"Bearer {key}"} if key else {})
    transport = _SNITransport(verify=context, local_address=address)
    return httpx.Client(base_url=f"https://127.0.0.1:{port}", headers=headers, timeout=20, transport=transport)
