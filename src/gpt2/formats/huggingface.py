"""The model folder of `transformers`: safetensors, PyTorch's pickles, or Flax's msgpack, beside a `config.json`."""

from collections.abc import Callable, Iterable
from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt2.errors import ModelFilesError, UserError
from gpt2.files import check_inside_folder, safetensors_header
from gpt2.formats import flax
from gpt2.formats.names import CONV1D_WEIGHTS, by_our_names
from gpt2.formats.pickled import read_pickle, stored_tensors
from gpt2.formats.stored import Stored, Weights, own_copy, read_json, write_json
from gpt2.model import GPT, GPTConfig
from gpt2.terminal import shorten

MAX_SHARD_BYTES = 5 * 10**9


def find(path: Path) -> Path | None:
    """The model folder at `path`, or `model` in the run folder at `path`. A weight file stands for its folder."""
    if path.is_file() and path.name.endswith((".safetensors", "pytorch_model.bin", "flax_model.msgpack")):
        path = path.parent
    return next((folder for folder in (path, path / "model") if (folder / "config.json").is_file()), None)


def read_weights(folder: Path) -> Weights:
    """All weights of a model folder. Raises UserError if there are none, a file is broken, or links out of it."""
    for name, read in (("model.safetensors", _safetensors), ("pytorch_model.bin", _pickles)):
        if files := _files(folder, name):
            return by_our_names([stored for file in files for stored in read(file)], folder, conv1d=True)
    if (folder / "flax_model.msgpack").is_file():
        check_inside_folder(folder / "flax_model.msgpack", folder)
        return flax.read_weights(folder / "flax_model.msgpack")
    hint = "; TensorFlow's tf_model.h5 is not read" if (folder / "tf_model.h5").is_file() else ""
    raise ModelFilesError(f"{folder} has no model.safetensors (nor pytorch_model.bin, nor flax_model.msgpack){hint}")


def _files(folder: Path, name: str) -> list[Path]:
    """The file of this name, or its shards in the order of the index; [] if there is neither."""
    index = folder / f"{name}.index.json"
    for path in (folder / name, index):
        check_inside_folder(path, folder)
    if (folder / name).is_file():
        return [folder / name]
    if not index.is_file():
        return []
    try:
        names = dict.fromkeys(read_json(index)["weight_map"].values())
        files = [folder / Path(name).name for name in names]
    except (UserError, KeyError, AttributeError, TypeError) as error:
        raise ModelFilesError(f"{index} is broken: {error}") from error
    for file in files:
        if not file.is_file():
            raise ModelFilesError(
                f"{folder} is not complete: {shorten(file.name)} is named in {index.name} and missing"
            )
        check_inside_folder(file, folder)
    return files


def _safetensors(path: Path) -> Iterable[Stored]:
    """The tensors by the header alone: a file of any size is mapped only after their shapes were checked."""
    header = safetensors_header(path)
    return [Stored(key, tuple(entry["shape"]), _reader(path, key)) for key, entry in header.items()]


def _reader(path: Path, key: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:  # opened again: a mapping that is kept counts as memory
                return own_copy(file.get_tensor(key))
        except (SafetensorError, OSError) as error:
            raise ModelFilesError(f"{path} is no whole safetensors file: {error}") from error

    return read


def _pickles(path: Path) -> list[Stored]:
    return stored_tensors(read_pickle(path), path)


def write_weights(model: GPT, folder: Path, dtype: torch.dtype, max_shard_size: int | str = MAX_SHARD_BYTES) -> None:
    """`model.safetensors`, or shards of at most `max_shard_size` (bytes, or "5GB") with their index."""
    tensors = {
        disk_name(name, model.config): _on_disk(name, parameter.detach(), dtype)
        for name, parameter in model.named_parameters()
    }
    plan = huggingface_hub.split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for filename, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def disk_name(name: str, config: GPTConfig) -> str:
    """The name of a parameter in the files that are written.

    A tied model has the names of openai-community's files (`wte.weight`), which more programs read than those with
    `transformer.`: mlx-lm and tinygrad read no others. An untied model needs the prefix, by which transformers
    recognizes a file with `lm_head.weight`.
    """
    return name.removeprefix("transformer.") if config.tie_word_embeddings else name


def _on_disk(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor.t() if name.endswith(CONV1D_WEIGHTS) else tensor).to("cpu", dtype).contiguous()
