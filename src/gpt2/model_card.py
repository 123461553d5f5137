"""A model card made from a run, and the upload of a model folder to the Hugging Face hub."""

import json
import tomllib
from pathlib import Path
from typing import Any

from gpt2.errors import ConfigError, UserError

SETTINGS = ("data", "init_from", "tokenizer", "block_size", "batch_size", "max_steps", "lr", "weight_decay", "seed")


def write_model_card(folder: Path, name: str, run: Path | None) -> None:
    """Write `README.md` into a model folder: how to load it, and the settings, losses and plot of the run, if any.

    name: of the repository, owner/name. Raises UserError if a file of the run cannot be read.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [gpt2]",
        "---",
        "",
        f"# {name}",
    ]
    shape = f"{config['n_layer']} layers of {config['n_embd']} channels, a context of {config['n_positions']:,} tokens"
    lines += ["", f"A GPT-2 with {shape} and a vocabulary of {config['vocab_size']:,}.", "", "```python"]
    lines += ["from transformers import AutoTokenizer, GPT2LMHeadModel", ""]
    lines += [f'model = GPT2LMHeadModel.from_pretrained("{name}")']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{name}")', "```", "", f"Or `gpt2 sample {name}`."]
    if run is not None:
        lines += _run_sections(run)
        if (run / "loss.png").is_file():
            (folder / "loss.png").write_bytes((run / "loss.png").read_bytes())
            lines += ["", "![loss](loss.png)"]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _run_sections(run: Path) -> list[str]:
    """The settings of a run, its last validation loss, and its report."""
    try:
        settings = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"the run folder {run} cannot be read: {error}") from error
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= value if isinstance(value, dict) else {key: value}
    lines = ["", "## Training", "", "| setting | value |", "|---|---|"]
    for key in SETTINGS:
        if flat.get(key) is not None:
            value = Path(str(flat[key])).name if key == "data" else flat[key]  # no path of this machine
            lines.append(f"| {key} | {value} |")
    validated = [row for row in metrics if row.get("val_loss") is not None]
    if validated:
        last, best = validated[-1], min(validated, key=lambda row: row["val_loss"])
        lines += ["", f"Validation loss {last['val_loss']:.4f} at step {last['step']:,}"]
        lines[-1] += f", lowest {best['val_loss']:.4f} at step {best['step']:,} (nats per token)."
    return lines


def check_repository_name(name: str) -> None:
    """Raise ConfigError for anything but owner/name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push '{name}' is no name of a repository: {error}", field="push") from error
    if name.count("/") != 1:
        raise ConfigError(f"--push '{name}' must be owner/name", field="push")


def push(folder: Path, name: str) -> str:
    """Upload a model folder to the repository `name`, which is created if there is none; returns its address.

    Raises UserError that names the reason.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        address = str(api.create_repo(name, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by gpt2 convert --push")
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"cannot upload {folder} to '{name}': {reason} (is HF_TOKEN a token that may write?)"
        ) from error
    return address
