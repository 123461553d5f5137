"""The checkpoint formats that are read, and which of them a path is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpt2.errors import ModelFilesError
from gpt2.formats import config as json_config
from gpt2.formats import gguf_file, huggingface, llmc, nanogpt, tensorflow
from gpt2.formats.stored import Weights
from gpt2.model import GPTConfig
from gpt2.templates import ChatTemplate, load_template
from gpt2.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Format:
    """A checkpoint format that is read.

    find:           the file or folder of the model at a path, None if it is not of this format.
    read:           config and weights; the weights stay in their files until they are used.
    read_config:    the config alone.
    read_tokenizer: the tokenizer that comes with the model, None without one.
    read_template:  the chat template that comes with the model, None without one.
    """

    name: str
    about: str
    find: Callable[[Path], Path | None]
    read: Callable[[Path], tuple[GPTConfig, Weights]]
    read_tokenizer: Callable[[Path], Tokenizer | None]
    read_config: Callable[[Path], GPTConfig]
    read_template: Callable[[Path], ChatTemplate | None] = lambda path: None


def _read_folder(folder: Path) -> tuple[GPTConfig, Weights]:
    return _folder_config(folder), huggingface.read_weights(folder)


def _folder_config(folder: Path) -> GPTConfig:
    return json_config.read_config(folder / "config.json")


def _beside(path: Path) -> Tokenizer | None:
    return load_tokenizer(path.parent)


READERS = (
    Format(
        "hf",
        "model folder of transformers: safetensors, pytorch_model.bin, flax_model.msgpack",
        huggingface.find,
        _read_folder,
        load_tokenizer,
        _folder_config,
        load_template,
    ),
    Format(
        "gguf",
        "llama.cpp: f32, f16, bf16 and quantized",
        gguf_file.find,
        gguf_file.read,
        gguf_file.read_tokenizer,
        lambda path: gguf_file.read(path)[0],
        gguf_file.read_template,
    ),
    Format("llmc", "llm.c's .bin: float32, bfloat16", llmc.find, llmc.read, _beside, lambda path: llmc.read(path)[0]),
    Format(
        "nanogpt",
        "ckpt.pt of nanoGPT, model_*.pt of build-nanogpt",
        nanogpt.find,
        nanogpt.read,
        nanogpt.read_tokenizer,
        lambda path: nanogpt.read(path)[0],
    ),
    Format(
        "openai",
        "OpenAI's TensorFlow checkpoint, and gpt-2-simple's",
        tensorflow.find,
        tensorflow.read,
        load_tokenizer,
        lambda path: tensorflow.read(path)[0],
    ),
)


def recognize(path: Path) -> tuple[Format, Path] | None:
    """The format of the model at `path`, and its file or folder; None if it is of no known format."""
    for each in READERS:
        found = each.find(path)
        if found is not None:
            return each, found
    return None


def format_of(path: Path) -> Format:
    """The format of a path that `recognize` returned. Raises ModelFilesError if it is of none."""
    known = recognize(path)
    if known is None:
        raise ModelFilesError(f"{path} is of no format that is read here (gpt2 convert --list)")
    return known[0]
