"""Runtime settings: device, dtype, random seeds, torch.compile, activation checkpointing, malloc."""

import ctypes
import getpass
import importlib.util
import logging
import os
import platform
import re
import shutil
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2.errors import ConfigError, UserError, did_you_mean
from gpt2.files import cache_home

log = logging.getLogger("gpt2")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # of mallopt, in malloc.h
MIN_BFLOAT16_WIDTH = 256  # on a CPU, narrower models lose in casts what bfloat16 products save
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def pick_device(name: str = "auto", *, fall_back: bool = False) -> torch.device:
    """The device called `name`: "auto" (cuda, else mps, else cpu), "cpu", "cuda", "cuda:1" or "mps".

    fall_back: use the CPU, with a warning, instead of a device that this machine does not have.
    Raises ConfigError for a device that this machine does not have, and for other names.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    parts = re.fullmatch(r"(cpu|cuda|mps)(?::([0-9]{1,4}))?", name)
    if parts is None:
        raise ConfigError(f"device '{name}' is not one of auto, cpu, cuda, cuda:N, mps", field="device")
    kind, index = parts[1], int(parts[2] or 0)
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and index < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[kind] and not fall_back:
        raise ConfigError(f"there is no {name} device on this machine: use --device cpu", field="device")
    if not available[kind]:
        log.warning("there is no %s device on this machine: running on the CPU", name)
        return torch.device("cpu")
    return torch.device(kind, index) if kind == "cuda" and parts[2] else torch.device(kind)


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """float32, bfloat16 or float16, by name or as it is. Raises ConfigError for any other."""
    if isinstance(name, torch.dtype) and name in DTYPE_NAMES:
        return name
    if not isinstance(name, str) or name not in DTYPES:
        message = f"dtype '{name}' is not one of {', '.join(DTYPES)}{did_you_mean(str(name), DTYPES)}"
        raise ConfigError(message, field="dtype")
    return DTYPES[name]


def pick_training_dtype(name: str, device: torch.device, width: int) -> torch.dtype:
    """The dtype of matrix products in training, by name, or by rule for "auto" (`auto_training_dtype`).

    Raises ConfigError for unknown names.
    """
    return auto_training_dtype(device, width)[0] if name == "auto" else parse_dtype(name)


def auto_training_dtype(device: torch.device, width: int) -> tuple[torch.dtype, str]:
    """The dtype of `--dtype auto` and the reason for it. Depends on the hardware and the model's width only.

    CUDA: bfloat16 where the GPU computes it natively. CPU: bfloat16 where the processor has AMX or AVX512-BF16 and the
    model at least `MIN_BFLOAT16_WIDTH` channels (docs/lab-notes.md). Otherwise float32.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU supports it"
        return torch.float32, "the GPU does not support bfloat16; --dtype float16 is faster"
    if device.type != "cpu":
        return torch.float32, f"the default on {device.type}"
    if not has_native_bfloat16():
        return torch.float32, "the CPU has neither AMX nor AVX512-BF16"
    if width < MIN_BFLOAT16_WIDTH:
        return torch.float32, f"a width of {width} is below {MIN_BFLOAT16_WIDTH}"
    return torch.bfloat16, f"the CPU has AMX or AVX512-BF16, and a width of {width} is at least {MIN_BFLOAT16_WIDTH}"


def has_native_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16 matrix products: AMX or AVX512-BF16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast: matrix products in `dtype`, other operations in float32. Disabled for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile works here: it needs Triton for a GPU, a C++ compiler for the CPU."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is not None


def pick_compile(requested: bool | None, device: torch.device, max_steps: int) -> bool:
    """Return whether to compile the blocks. None means automatic: on a GPU, for runs of at least 200 steps.

    On a CPU, compiling takes about 20 s and gains about 5% (docs/lab-notes.md), so it must be requested there.
    A request that this machine cannot fulfil is ignored with a warning.
    """
    if requested is None:
        return device.type == "cuda" and max_steps >= 200 and can_compile(device)
    if requested and not can_compile(device):
        log.warning("torch.compile needs a C++ compiler (CPU) or Triton (GPU), and none was found: not compiling")
        return False
    return requested


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Compile each transformer block in place; all share the code of the first, and no parameter is renamed.

    torch's compiler names its cache after the user. Where the user has no name, it is in our own cache.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        try:
            getpass.getuser()
        except (KeyError, OSError):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_home() / "inductor")
    for block in blocks:
        block.compile()


def apply_activation_checkpointing(blocks: nn.ModuleList) -> None:
    """Activation checkpointing (Chen et al. 2016): store each block's input only, and recompute it in backward."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def configure_malloc(*, keep_freed: bool) -> None:
    """Set glibc's policy for memory that tensors free. Without glibc this does nothing.

    keep_freed: keep freed memory in the process. A training step on a CPU frees and allocates gigabytes; the system
        zeroes every page that it returns, which takes up to a third of a step (docs/lab-notes.md). If False, memory
        of larger tensors is returned at once: slower, but without fragmentation.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0 if keep_freed else 2**16)  # number of tensors with a mapping of their own
        libc.mallopt(M_MMAP_THRESHOLD, 2**16)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if keep_freed else 2**17)
        libc.mallopt(M_TOP_PAD, 2**26 if keep_freed else 2**17)


def seed_everything(seed: int) -> None:
    """Seed torch's global random state on every device. Raises UserError for a number of more than 64 bits."""
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"the seed must lie between -2**63 and 2**64, and {seed} does not")
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's global random state for one step on one rank."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def get_rng_state(device: torch.device) -> dict[str, Tensor]:
    """torch's random state for dropout on `device`: of the CPU and of a CUDA device; about 5 kB."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore a state of `get_rng_state`; a CUDA state is ignored on other devices."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work, for timing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
