"""The hostile inputs of the review that found them, and their neighbours: {kind: {name: files}}.

Those that are no files are tested elsewhere: requests in `test_requests`, dtypes in `test_runtime`, connections and
bodies in `serve/test_hostile`, caches in `data/test_prepare`, `test_tokenizer_files` and `test_native`.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from tests.fuzz.inputs import Files, Link, Sparse
from tests.fuzz.seeds import ROWS, parquet

Seed = Mapping[str, bytes]
TEMPLATES = {
    "three loops": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{{ n.x }}{% endfor %}",
    "recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "30 for": "{% for x in messages %}" * 30 + "{% endfor %}" * 30,
    "200 if": "{% if true %}" * 200 + "{% endif %}" * 200,
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "power": "{{10**5000}}",
    "long literal": "{{ " + "9" * 5000 + " }}",
    "infinite": "{{1e308*10}}",
    "stray break": "{% break %}",
    "tojson": "{{ messages | tojson(cls=dict) }}",
    "format": "{{ '%2000000000d' | format(1) }}",
    "center": "{{ 'a' | center(2000000000) }}",
    "secret": "{{ messages.__class__.__mro__ }}{% include '/etc/passwd' %}",
    "ends its process": "{{ cycler.__init__.__globals__.os.kill(0, 9) }}",
}


def corpus(seeds: Mapping[str, Seed]) -> dict[str, Mapping[str, Files]]:
    """All cases, made from valid folders."""
    return {
        "model": _models(seeds["model"]),
        "tokenizer": _tokenizers(seeds["tokenizer"]),
        "template": _templates(seeds["template"]),
        "adapter": _adapters(seeds["adapter"]),
        "rows": _rows(),
        "pattern": _patterns(),
        "parquet": _parquets(),
        "shards": _shards(seeds["shards"]),
        "metrics": _metrics(seeds["metrics"]),
    }


def edited(seed: Seed, name: str, change: Callable[[Any], object]) -> Files:
    """The files with a change of one JSON document."""
    document = json.loads(seed[name])
    change(document)
    return {**seed, name: json.dumps(document).encode()}


def _links(seed: Seed) -> dict[str, Files]:
    """Every file as a link to a secret, and to a place that does not end."""
    links: dict[str, Files] = {f"{name} is a secret": {**seed, name: Link("/etc/passwd")} for name in seed}
    return links | {f"{name} is endless": {**seed, name: Link("/dev/zero")} for name in seed}


def _safetensors(entries: dict[str, Any], size: int = 0) -> bytes | Sparse:
    header = json.dumps(entries).encode()
    head = len(header).to_bytes(8, "little") + header
    return Sparse(head, len(head) + size) if size else head


def _models(seed: Seed) -> dict[str, Files]:
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)}
    huge = {"transformer.wte.weight": {"dtype": "F32", "shape": [300, 25_000_000], "data_offsets": [0, 3 * 10**10]}}
    weights = {
        "300,000 tensors": _safetensors(many),
        "sparse 30 GB": _safetensors(huge, 3 * 10**10),
        "a huge header": b"\xff" * 7 + b"\x7f{}",
        "an empty file": b"",
        "a folder": Link("."),
    }
    cases: dict[str, Files] = {name: {**seed, "model.safetensors": content} for name, content in weights.items()}
    for value in (10**400, -1, 0, 2**31, 2**62, 1.5, "2", None, True, [2]):
        for key in ("layer_norm_epsilon", "n_layer", "n_embd", "n_head", "vocab_size", "eos_token_id", "n_inner"):
            cases[f"{key} {value!r:.20}"] = edited(seed, "config.json", lambda c, k=key, v=value: c.update({k: v}))
    return cases | _links(seed)


def _tokenizers(seed: Seed) -> dict[str, Files]:
    def split(pattern: Any) -> Callable[[Any], object]:
        part = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        return lambda spec: spec.update(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [part, spec["pre_tokenizer"]]}
        )

    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    sequence = {"type": "Sequence"}
    changes: dict[str, Callable[[Any], object]] = {
        "(a+)+$": split({"Regex": "(a+)+$"}),
        "(a|a)*b": split({"Regex": "(a|a)*b"}),
        "(?<=a+)b": split({"Regex": "(?<=a+)b"}),
        "a{100000}": split({"Regex": "(a{1000}){1000}"}),
        "an empty pattern": split({"String": ""}),
        "charsmap": lambda spec: spec.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "1,000 pre-tokenizers": lambda spec: spec.update(
            pre_tokenizer={**sequence, "pretokenizers": [spec["pre_tokenizer"]] * 1000}
        ),
        "1,000 replaces": lambda spec: spec.update(normalizer={**sequence, "normalizers": [replace] * 1000}),
        "40 replaces": lambda spec: spec.update(normalizer={**sequence, "normalizers": [replace] * 40}),
        "a decoder": lambda spec: spec.update(
            decoder={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
        ),
        "prefix": lambda spec: spec["model"].update(continuing_subword_prefix="####"),
        "an id of 2**62": lambda spec: spec["model"]["vocab"].update(qq=2**62),
        "an added token": lambda spec: spec["added_tokens"][0].update(content=""),
        "an added id": lambda spec: spec["added_tokens"][0].update(id=-1),
        "a content that is no text": lambda spec: spec["added_tokens"][0].update(content=[["<|endoftext|>"]]),
        "a long type": lambda spec: spec["model"].update(dropout="x" * 10_000),
        "a long content": lambda spec: spec["added_tokens"][0].update(content="x" * 10_000),
        "a long token": lambda spec: spec["model"]["vocab"].update({"é" * 10_000 + " ": 5}),
        "type ids": lambda spec: spec.update(
            post_processor={"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {"x": {"id": 5}}}
        ),
    }
    return {name: edited(seed, "tokenizer.json", change) for name, change in changes.items()} | _links(seed)


def _templates(seed: Seed) -> dict[str, Files]:
    cases: dict[str, Files] = {
        name: {**seed, "chat_template.jinja": source.encode()} for name, source in TEMPLATES.items()
    }
    named = [{"name": [1], "template": "A"}, {"name": "default", "template": 5}]
    cases["a list for a name"] = {"tokenizer_config.json": json.dumps({"chat_template": named}).encode()}
    return cases | _links(seed)


def _adapters(seed: Seed) -> dict[str, Files]:
    cases: dict[str, Files] = {}
    for value in (10**400, -1, 0, 2**62, 1e308, "2", None, True, [2], "(a+)+$", "x" * 10_000, {"x" * 10_000: 1}):
        for key in (
            "r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
            "use_rslora",
            "rank_pattern",
            "fan_in_fan_out",
            "base_model_name_or_path",
            "peft_type",
            "init_lora_weights",
            "modules_to_save",
            "alpha_pattern",
        ):
            cases[f"{key} {value!r:.20}"] = edited(
                seed, "adapter_config.json", lambda c, k=key, v=value: c.update({k: v})
            )
    return cases | _links(seed)


def _rows() -> dict[str, Files]:
    lines = {
        "no break": b"a" * 3_000_000,
        "no break in a row": json.dumps({"text": "a" * 1_000_000}).encode(),
        "deep": b"[" * 1_000_000,
        "digits": b'{"text": ' + b"9" * 10_000 + b"}",
        "surrogates": b'{"prompt": "\\ud800", "answer": "\\udfff"}',
        "numbers": b'{"prompt": 1e999, "answer": NaN}',
        "not UTF-8": ROWS + b'{"prompt": "\xff"}\n',
        "nul": b"\0" * 1000,
    }
    cases: dict[str, Files] = {name: {"rows.jsonl": content} for name, content in lines.items()}
    cases |= {f"{name} (csv)": {"rows.csv": b"prompt,answer\n" + content} for name, content in lines.items()}
    cases |= {f"{name} (text)": {"a.txt": content} for name, content in lines.items()}
    return cases | {
        "quotes": {"rows.csv": b'prompt,answer\n"' + b"a\n" * 100_000},
        "columns": {"rows.csv": b"a," * 200_000},
        "other columns": {"rows.csv": ",".join(f"a{i}" for i in range(200_000)).encode()},
        "a long column": {"rows.csv": b"a" * 100_000 + b"\n1\n"},
        "a long role": {"rows.jsonl": json.dumps({"messages": [{"role": "r" * 10**5, "content": "a"}]}).encode()},
        "whitespace (text)": {"a.txt": b" " * 10**7},
        "whitespace between separators (text)": {"a.txt": b"a<|endoftext|>" + b" \n" * 10**6 + b"<|endoftext|>b"},
    }


def _patterns() -> dict[str, Files]:
    texts = {"a/one.txt": b"one", "b/two.txt": b"two"}
    return {
        "loops of links": {**texts, "a/up": Link(".."), "b/up": Link(".."), "b/a": Link("../a")},
        "a link to itself": {**texts, "me": Link("me"), "me.txt": Link("me.txt")},
        "endless": {**texts, "zero.txt": Link("/dev/zero")},
    }


def _parquets() -> dict[str, Files]:
    try:
        import pyarrow as pa
    except ImportError:
        return {}
    text = ["x"]
    columns = {
        "timestamp[ns]": {"text": text, "t": pa.array([1], pa.timestamp("ns"))},
        "far timestamp[s]": {"text": text, "t": pa.array([1 << 50], pa.timestamp("s"))},
        "duration[s]": {"text": text, "t": pa.array([1 << 60], pa.duration("s"))},
        "timestamp as text": {"text": pa.array([1 << 50], pa.timestamp("s"))},
        "invalid UTF-8": {"text": pa.array([b"\xff"], pa.binary()).view(pa.string())},
        "growth": {"text": ["a" * 10_000] * 20_000},
    }
    cases: dict[str, Files] = {name: {"rows.parquet": parquet(table)} for name, table in columns.items()}
    whole = parquet({"text": text})  # these bytes are those of pyarrow 26: another version may have no such place
    broken = {
        "required, with definition levels": (b"%\x02\x18\x04text%", b"%\x00\x18\x04text%"),
        "repetition levels": (b"\x19\x06\x19&", b"\x19F\x19&"),
        "a name that is not UTF-8": (b"\x18\x04text%", b"\x18\x04t\x9dxt%"),
    }
    return cases | {name: {"rows.parquet": whole.replace(*change)} for name, change in broken.items()}


def _shards(seed: Seed) -> dict[str, Files]:
    shard = next(name for name in seed if name.endswith(".bin"))
    head = seed[shard][:1024]
    sizes = {
        "too many tokens": head[:8] + b"\xff\xff\xff\x7f" + head[12:],
        "no header": b"",
        "half": seed[shard][:1500],
    }
    cases: dict[str, Files] = {name: {**seed, shard: content} for name, content in sizes.items()}
    cases["sparse"] = {**seed, shard: Sparse(head[:8] + b"\xff\xff\xff\x7f" + head[12:], 1024 + 2 * (2**31 - 1))}
    cases["elsewhere"] = {**seed, "meta.json": seed["meta.json"].replace(shard.encode(), b"../../etc/passwd")}
    for value in ("x" * 10_000, 10**400, [["x"] * 5000], "\n\x1b[2J"):
        cases[f"version {value!r:.20}"] = edited(seed, "meta.json", lambda meta, v=value: meta.update(version=v))
        cases[f"name {value!r:.20}"] = edited(
            seed, "meta.json", lambda meta, v=value: meta["splits"]["train"]["files"][0].update(name=v)
        )
        cases[f"tokenizer {value!r:.20}"] = edited(
            seed, "meta.json", lambda meta, v=value: meta["tokenizer"].update(name=v, vocab_size=v, fingerprint=v)
        )
    return cases | {
        f"{shard} is endless": {**seed, shard: Link("/dev/zero")},
        "meta": {**seed, "meta.json": b"[" * 10**6},
    }


def _metrics(seed: Seed) -> dict[str, Files]:
    lines = seed["metrics.jsonl"]
    keys = (b"step", b"loss", b"tokens", b"tokens_per_second", b"eval/hellaswag/acc")
    cases: dict[str, Files] = {
        f"{key.decode()} flipped": {"metrics.jsonl": lines.replace(b'"' + key + b'"', b'"x' + key[1:] + b'"', 1)}
        for key in keys
    }
    return cases | {
        "a text": {"metrics.jsonl": lines.replace(b"5.5", b'"5.5"')},
        "a folder": {"metrics.jsonl": Link(".")},
    }
