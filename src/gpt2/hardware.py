"""Hardware: FLOP/s and memory bandwidth, measured or from datasheets; memory size, free memory, and peak memory."""

import ctypes
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2.errors import ConfigError, did_you_mean

GiB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """The datasheet of a GPU: dense rates, without structured sparsity, at boost clock.

    bf16, tf32, fp32:  FLOP/s of matrix products (accumulated in float32). Without bfloat16 or TF32 in hardware, `bf16`
                       is the float16 rate and `tf32` the float32 rate.
    bandwidth, memory: bytes/s of its memory; bytes available to a program, as torch reports them.
    link_bandwidth:    bytes/s in each direction to the other GPUs of its machine.
    network_bandwidth: bytes/s in each direction of its own network card; 0 where all GPUs of a machine share one.
    """

    name: str
    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    memory: int
    link_bandwidth: float
    network_bandwidth: float
    bfloat16: bool = True  # in hardware

    def flops(self, dtype: torch.dtype, matmul_precision: str = "high") -> float:
        """Peak FLOP/s of matrix products in `dtype`; float32 at "high" or "medium" precision runs in TF32."""
        if dtype in (torch.bfloat16, torch.float16):
            return self.bf16
        return self.fp32 if matmul_precision == "highest" else self.tf32

    def node_bandwidth(self, gpus: int) -> float:
        """The usual bytes/s in each direction between machines with `gpus` of these."""
        return gpus * self.network_bandwidth or SHARED_NETWORK_BANDWIDTH


# GB/s in each direction. Sources: NVIDIA's whitepapers of V100, A100, H100 and Blackwell (half of the bidirectional
# rates), AMD's of CDNA 3 (seven links of 64), PCI Express with 16 lanes. NVLink bridges of PCIe cards are not counted.
NVLINK_2, NVLINK_3, NVLINK_4, NVLINK_5, INFINITY_FABRIC = 150, 300, 450, 900, 448
PCIE_3, PCIE_4, PCIE_5 = 16, 32, 64
# A GPU's share of the network in the vendors' own machines with eight GPUs (DGX-1 with V100: four cards of 100 Gbit/s;
# DGX A100: eight of 200; DGX H100, DGX B200 and MI300X platforms: eight of 400). PCIe GPUs share one card of 100.
GBIT_400, GBIT_200, GBIT_50 = 50, 25, 6.25
SHARED_NETWORK_BANDWIDTH = 12.5e9


def _gpu(
    name: str,
    bf16: float,
    tf32: float,
    fp32: float,
    bandwidth: float,
    memory: float,
    link: float,
    network: float = 0.0,
    *,
    bfloat16: bool = True,
) -> Accelerator:
    """An accelerator from TFLOP/s, GB/s and GiB."""
    rates = (bf16 * 1e12, tf32 * 1e12, fp32 * 1e12)
    return Accelerator(name, *rates, bandwidth * 1e9, int(memory * GiB), link * 1e9, network * 1e9, bfloat16)


# Sources: NVIDIA's datasheets of each board and the whitepapers of GA102, AD102 and GB202 (GeForce: tensor cores with
# float32 accumulation), AMD's datasheets of the Instinct series. Rates given "with sparsity" are halved.
ACCELERATORS: dict[str, Accelerator] = {
    "b200": _gpu("NVIDIA B200", 2250, 1100, 75, 7700, 178.3, NVLINK_5, GBIT_400),
    "gh200": _gpu("NVIDIA GH200", 989.4, 494.7, 66.9, 4000, 94.5, NVLINK_4, GBIT_400),
    "h200-nvl": _gpu("NVIDIA H200 NVL", 835.5, 417.5, 60, 4800, 139.8, PCIE_5),
    "h200": _gpu("NVIDIA H200", 989.4, 494.7, 66.9, 4800, 139.8, NVLINK_4, GBIT_400),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", 756, 378, 51, 2000, 79.2, PCIE_5),
    "h100-nvl": _gpu("NVIDIA H100 NVL", 835.5, 417.5, 60, 3900, 93.1, PCIE_5),
    "h100": _gpu("NVIDIA H100 SXM", 989.4, 494.7, 66.9, 3350, 79.2, NVLINK_4, GBIT_400),
    "a100-40gb": _gpu("NVIDIA A100 40GB", 312, 156, 19.5, 1555, 39.4, NVLINK_3, GBIT_200),
    "a100-pcie": _gpu("NVIDIA A100 80GB PCIe", 312, 156, 19.5, 1935, 79.2, PCIE_4),
    "a100": _gpu("NVIDIA A100 80GB SXM", 312, 156, 19.5, 2039, 79.2, NVLINK_3, GBIT_200),
    "a30": _gpu("NVIDIA A30", 165, 82, 10.3, 933, 23.5, PCIE_4),
    "a40": _gpu("NVIDIA A40", 149.7, 74.8, 37.4, 696, 44.4, PCIE_4),
    "a10g": _gpu("NVIDIA A10G", 70, 35, 31.5, 600, 22.1, PCIE_4),
    "a10": _gpu("NVIDIA A10", 125, 62.5, 31.2, 600, 22.1, PCIE_4),
    "a6000": _gpu("NVIDIA RTX A6000", 154.8, 77.4, 38.7, 768, 47.5, PCIE_4),
    "6000-ada": _gpu("NVIDIA RTX 6000 Ada", 364.2, 182.1, 91.1, 960, 47.4, PCIE_4),
    "l40s": _gpu("NVIDIA L40S", 362.05, 183, 91.6, 864, 44.4, PCIE_4),
    "l40": _gpu("NVIDIA L40", 181.05, 90.5, 90.5, 864, 44.4, PCIE_4),
    "l4": _gpu("NVIDIA L4", 121, 60, 30.3, 300, 22.0, PCIE_4),
    "v100-32gb": _gpu("NVIDIA V100 32GB", 125, 15.7, 15.7, 900, 31.7, NVLINK_2, GBIT_50, bfloat16=False),
    "v100": _gpu("NVIDIA V100 16GB", 125, 15.7, 15.7, 900, 15.8, NVLINK_2, GBIT_50, bfloat16=False),
    "t4": _gpu("NVIDIA T4", 65, 8.1, 8.1, 320, 14.6, PCIE_3, bfloat16=False),
    "5090": _gpu("NVIDIA RTX 5090", 209.5, 104.8, 104.8, 1792, 31.4, PCIE_5),
    "4090": _gpu("NVIDIA RTX 4090", 165.2, 82.6, 82.6, 1008, 23.6, PCIE_4),
    "4080": _gpu("NVIDIA RTX 4080", 97.5, 48.7, 48.7, 717, 15.7, PCIE_4),
    "3090": _gpu("NVIDIA RTX 3090", 71, 35.6, 35.6, 936, 23.7, PCIE_4),
    "mi325x": _gpu("AMD Instinct MI325X", 1307.4, 653.7, 163.4, 6000, 255.9, INFINITY_FABRIC, GBIT_400),
    "mi300x": _gpu("AMD Instinct MI300X", 1307.4, 653.7, 163.4, 5300, 191.9, INFINITY_FABRIC, GBIT_400),
}
VARIANT_WORDS = {"laptop", "mobile", "mig", "d", "ti", "super", "max"}  # words that denote another chip


def find_accelerator(name: str) -> Accelerator | None:
    """The datasheet for a name from `torch.cuda.get_device_name()`, or a short name (h100, rtx4090, a100-40gb).

    None for a device that is not in the table, such as a laptop's 4090 or a MIG slice of an H100.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower().replace("rtx", " ").replace("tesla", " ")))
    if words & VARIANT_WORDS:
        return None
    matching = [key for key in ACCELERATORS if set(key.split("-")) <= words]
    return ACCELERATORS[max(matching, key=lambda key: key.count("-"))] if matching else None


def get_accelerator(name: str) -> Accelerator:
    """The datasheet for `name`. Raises ConfigError for an unknown name."""
    found = find_accelerator(name)
    if found is None:
        known = ", ".join(sorted(ACCELERATORS))
        hint = did_you_mean(name.lower(), ACCELERATORS)
        raise ConfigError(f"no datasheet of '{name}'{hint}: there are {known}", field="on")
    return found


def measure_matmul(device: torch.device, dtype: torch.dtype, seconds: float = 0.5, size: int | None = None) -> float:
    """FLOP/s of matrix products on `device`: the best of three shapes, of each the median, in about `seconds`.

    size: the shapes are (size, size) @ (size, size), and the two of a GPT-2 MLP with size/4 channels; None for a size
    that saturates the device. On a GPU float32 uses the precision set by `torch.set_float32_matmul_precision`.
    """
    size = size or (8192 if device.type == "cuda" else 4096 if device.type == "mps" else 1024)
    best = 0.0
    for m, k, n in ((size, size, size), (size, size // 4, size), (size, size, size // 4)):
        a = torch.randn(m, k, device=device, dtype=dtype)
        b = torch.randn(n, k, device=device, dtype=dtype)  # (out, in), as nn.Linear keeps its weights
        out = torch.empty(m, n, device=device, dtype=dtype)
        elapsed = _median_seconds(lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out), device, seconds / 3)
        best = max(best, 2 * m * k * n / elapsed)
    return best


def measure_bandwidth(device: torch.device, seconds: float = 0.3) -> float:
    """Bytes/s at which `device` reads its memory: the sum over a buffer much larger than any cache."""
    size = min(GiB if device.type == "cuda" else GiB // 2, available_memory(device) // 4)
    buffer = torch.ones(max(1, size // 4), device=device)  # float32
    return 4 * buffer.numel() / _median_seconds(lambda: buffer.sum(), device, seconds)


def _median_seconds(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of `work`, repeated at least three times and until `seconds` have passed.

    On a GPU each repetition is a batch of calls of about 10 ms, so that launch overhead does not count.
    """
    work()  # warm-up
    _synchronize(device)
    calls, times = 1, []
    if device.type != "cpu":
        start = time.perf_counter()
        work()
        _synchronize(device)
        calls = max(1, round(0.01 / (time.perf_counter() - start)))
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        _synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """The product name of the device: "NVIDIA H100 80GB HBM3", "AMD EPYC", "Apple M2"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _read_text("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def total_memory(device: torch.device) -> int:
    """Bytes of memory of `device`; for the CPU, the smaller of the machine's memory and this process's cgroup limit."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if sys.platform == "win32":
        return _windows_memory()
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _ in _cgroup_limits())])


def available_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on `device`, including memory that torch reserved and does not use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return max(0, total_memory(device) - torch.mps.driver_allocated_memory())
    available = _proc_field_bytes("MemAvailable", _read_text("/proc/meminfo"))
    free = total_memory(device) if available is None else available
    return max(0, min([free, *(limit - used for limit, used in _cgroup_limits())]))


def peak_memory(device: torch.device) -> int:
    """The peak of bytes in use since the start, or since `reset_peak_memory`.

    CUDA: torch's tensors (`max_memory_allocated`), without the context and the allocator's cache.
    CPU: the resident memory of the process (VmHWM on Linux, getrusage elsewhere; 0 on Windows).
    MPS: the bytes allocated now, as no peak is recorded.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    peak = _proc_field_bytes("VmHWM", _read_text("/proc/self/status"))
    if peak is not None:
        return peak
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> bool:
    """Restart the record of the peak. Return False where the system does not allow it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5): resets VmHWM to what is resident now
    except OSError:
        return False
    return True


def resident_memory() -> int:
    """Resident bytes of this process (on systems without /proc: the peak)."""
    resident = _proc_field_bytes("VmRSS", _read_text("/proc/self/status"))
    return peak_memory(torch.device("cpu")) if resident is None else resident


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, used) in bytes of this process's control group and its ancestors, without those that have no limit."""
    found = []
    v2 = re.search(r"^0::(/.*)$", _read_text("/proc/self/cgroup"), re.MULTILINE)
    folder = Path("/sys/fs/cgroup") / v2[1].strip("/") if v2 else Path("/sys/fs/cgroup")
    for place in (folder, *folder.parents):
        limit, used = _read_text(place / "memory.max").strip(), _read_text(place / "memory.current").strip()
        if limit.isdigit() and used.isdigit():
            found.append((int(limit), int(used) - _file_cache(place)))
        if place == Path("/sys/fs/cgroup"):
            break
    old = Path("/sys/fs/cgroup/memory")  # version 1
    limit, used = _read_text(old / "memory.limit_in_bytes").strip(), _read_text(old / "memory.usage_in_bytes").strip()
    if limit.isdigit() and used.isdigit() and int(limit) < 2**60:
        found.append((int(limit), int(used) - _file_cache(old)))
    return found


def _file_cache(group: Path) -> int:
    """Bytes of a control group's file cache that can be reclaimed."""
    found = re.search(r"^inactive_file (\d+)$", _read_text(group / "memory.stat"), re.MULTILINE)
    return int(found[1]) if found else 0


def _proc_field_bytes(field: str, text: str) -> int | None:
    """The value in bytes of a line such as ``VmHWM:   1234 kB`` of a file in /proc."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def _read_text(path: str | Path) -> str:
    """The text of a small system file; "" if it does not exist or cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _windows_memory() -> int:
    kilobytes = ctypes.c_ulonglong()
    ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))  # pyright: ignore
    return 1024 * kilobytes.value
