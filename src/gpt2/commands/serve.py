"""gpt2 serve MODEL [MODEL ...]"""

import gc
import logging
import os
import re
import socket
from argparse import Namespace
from contextlib import ExitStack, suppress
from dataclasses import fields
from typing import Any

from gpt2.cli import Parser, parse_size
from gpt2.commands.generation_args import add_model_flags, load_model, resolve_from_args
from gpt2.errors import ConfigError, did_you_mean, missing_extra
from gpt2.progress import print_status
from gpt2.serve.limits import Limits


def main(argv: list[str]) -> int:
    """`gpt2 serve`: exit code 0 after a signal, 1 when the thread of a model has died."""
    args = make_parser().parse_args(argv)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise missing_extra(error.name or "FastAPI", "serve", "gpt2 serve") from error
    return _serve(args)


def make_parser() -> Parser:
    """The parser of `gpt2 serve`."""
    parser = Parser(
        prog="gpt2 serve",
        description="Serve OpenAI's API (completions, chat completions, models) and the playground. "
        "SIGTERM or Ctrl-C finishes running requests and refuses new ones.",
        examples=("gpt2 serve runs/quickstart", "gpt2 serve gpt2 gpt2-medium --port 9000 --dtype bfloat16"),
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="run folders, model folders, or hub names")
    parser.add_flag("host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on [127.0.0.1]")
    parser.add_flag("port", type=int, default=8000, metavar="INT", help="0 for a free port [8000]")
    parser.add_flag(
        "api-key",
        action="append",
        metavar="KEY",
        help="key that clients must send; may be given several times [$GPT2_API_KEY]",
    )
    parser.add_flag("no-api-key", action="store_true", help="accept requests without a key, even from other machines")
    parser.add_flag(
        "allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another host name of the server, such as that of a proxy; may be given several times",
    )
    parser.add_flag(
        "allowed-origins",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="site whose pages may use the server from a browser, such as https://chat.example, or * for any; "
        "may be given several times",
    )
    parser.add_flag(
        "model-alias",
        action="append",
        default=[],
        metavar="ALIAS=NAME",
        help="another name for a model, such as gpt-3.5-turbo=quickstart; may be given several times",
    )
    parser.add_flag(
        "trusted-proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="proxy whose X-Forwarded-For is used; may be given several times",
    )
    for limit in fields(Limits):
        name, kind, default = limit.name.replace("_", "-"), type(limit.default), limit.default
        if limit.name == "max_body":
            help_text = f"{limit.metadata['help']} [{Limits.max_body // 2**20} MiB]"
            parser.add_flag(name, type=parse_size, default=default, metavar="SIZE", help=help_text)
            continue
        help_text = f"{limit.metadata['help']} [{default:g}]"
        parser.add_flag(name, type=kind, default=default, metavar=kind.__name__.upper(), help=help_text)
    parser.add_flag("context", type=int, metavar="INT", help="context length in tokens [the model's]")
    parser.add_flag(
        "grace", type=float, default=30.0, metavar="SECONDS", help="time to finish running requests at shutdown [30]"
    )
    parser.add_flag("log-requests", action="store_true", help="log a line for each request, without its prompt")
    parser.add_flag("log-prompts", action="store_true", help="the same, with the prompt")
    add_model_flags(parser)
    return parser


def _serve(args: Namespace) -> int:
    from gpt2.hardware import GiB
    from gpt2.serve.app import create_app
    from gpt2.serve.middleware import LOOPBACK_HOSTS, AccessPolicy
    from gpt2.serve.uvicorn_server import Server, base_url, is_loopback

    limits = Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})
    loopback = is_loopback(args.host)
    keys = _api_keys(args, loopback)
    if not 0 <= args.port < 2**16:
        raise ConfigError(f"--port must be 0 to 65535, not {args.port}", field="port")
    aliases = _parse_aliases(args)
    _check_origins(args.allowed_origins)
    hosts = [*LOOPBACK_HOSTS, args.host.strip("[]"), *args.allowed_host] if loopback or args.allowed_host else None
    with ExitStack() as stack:
        listeners = _bind(args.host, args.port, stack)  # before the models are loaded, to fail early
        models = _load_models(args, limits)
        access = AccessPolicy(keys, hosts)
        app = create_app(models, limits, access, args.log_prompts, aliases, args.allowed_origins)
        if args.log_requests or args.log_prompts:
            logging.getLogger("gpt2.serve").setLevel(logging.INFO)

        def ready() -> None:
            gc.collect()
            gc.freeze()  # a full collection over all objects of the libraries would stall every sequence for 0.1 s
            slots = f"{limits.slots} slots, {_cache_bytes(models) / GiB:.2f} GiB of cache"
            print_status(f"serving {', '.join(models)} at {base_url(listeners[0])} ({slots})")

        server = Server(app, list(models.values()), args.grace, ready, args.trusted_proxy)
        server.run(sockets=listeners)
    if server.broken:
        print_status("the thread of a model has died (see above)")
    return int(server.broken)


def _bind(host: str, port: int, stack: ExitStack) -> list[socket.socket]:
    """The listening sockets, closed with the stack: one, or for localhost one for each of its two addresses."""
    from gpt2.serve.uvicorn_server import bind_socket

    if host.lower() != "localhost":
        return [stack.enter_context(bind_socket(host, port))]
    listeners = [stack.enter_context(bind_socket("127.0.0.1", port))]
    with suppress(ConfigError):  # a machine without IPv6
        listeners.append(stack.enter_context(bind_socket("::1", listeners[0].getsockname()[1])))
    return listeners


def _parse_aliases(args: Namespace) -> dict[str, str]:
    """{alias: name of a model}. Raises ConfigError."""
    from gpt2.serve.models import served_model_name

    names, aliases = [served_model_name(ref) for ref in args.models], {}
    for given in args.model_alias:
        alias, separator, name = given.partition("=")
        if not (alias and separator):
            raise ConfigError(f"--model-alias must be ALIAS=NAME, not {given}", field="model_alias")
        if name not in names:
            hint = did_you_mean(name, names) or f": there is {', '.join(names)}"
            raise ConfigError(f"--model-alias {given}: no model has the name '{name}'{hint}", field="model_alias")
        if alias in names or alias in aliases:
            raise ConfigError(f"--model-alias {given}: the name '{alias}' is taken", field="model_alias")
        aliases[alias] = name
    return aliases


def _check_origins(origins: list[str]) -> None:
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+/?", origin.lower()):
            message = f"--allowed-origins {origin}: an origin has a scheme and a host, such as https://chat.example"
            raise ConfigError(message, field="allowed_origins")


def _api_keys(args: Namespace, loopback: bool) -> list[str]:
    """The API keys. Raises ConfigError for a server that other machines could use without one, unless requested."""
    given = args.api_key or [os.environ.get("GPT2_API_KEY", "")]
    keys = [key for key in given if key]
    if args.no_api_key and args.api_key:
        raise ConfigError("--api-key and --no-api-key exclude each other", field="api_key")
    if args.api_key and len(keys) < len(given):
        raise ConfigError("--api-key is empty", field="api_key")
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ConfigError("an API key must have only printable ASCII characters and no spaces", field="api_key")
    if not keys and not loopback and not args.no_api_key:
        message = (
            f"--host {args.host} is open to other machines: set $GPT2_API_KEY, or give --api-key (or --no-api-key)"
        )
        raise ConfigError(message, field="api_key")
    return [] if args.no_api_key else keys


def _load_models(args: Namespace, limits: Limits) -> dict[str, Any]:
    """The models by name, loaded and with their schedulers."""
    from gpt2.generation.inference import prepare_for_inference
    from gpt2.serve.models import create_served_model, served_model_name

    if args.context is not None and args.context < 1:
        raise ConfigError(f"--context must be at least 1, not {args.context}", field="context")
    models: dict[str, Any] = {}
    for ref in args.models:
        name = served_model_name(ref)
        if name in models:
            raise ConfigError(f"two models have the name {name}: names must be different")
        resolved = resolve_from_args(args, ref)
        model, tokenizer = load_model(args, resolved)
        inference_model = prepare_for_inference(model, args.dtype)
        models[name] = create_served_model(
            name, model, inference_model, tokenizer, limits, resolved.template, args.context, ref
        )
    return models


def _cache_bytes(models: dict[str, Any]) -> int:
    return sum(served.scheduler.cache_bytes for served in models.values())
