"""What machines can do: datasheets by name, and this one measured."""

import pytest
import torch

from gpt2.hardware import (
    ACCELERATORS,
    available_memory,
    device_name,
    find_accelerator,
    get_accelerator,
    measure_bandwidth,
    measure_matmul,
    peak_memory,
    resident_memory,
    total_memory,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("AMD Instinct MI300X", "mi300x"),
        ("rtx4090", "4090"),
        ("H100", "h100"),
    ],
)
def test_gpus_are_known_by_what_torch_and_people_call_them(said: str, meant: str) -> None:
    assert find_accelerator(said) is ACCELERATORS[meant]


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "AMD EPYC"]
)
def test_other_chips_of_the_same_number_are_not_mistaken_for_them(name: str) -> None:
    assert find_accelerator(name) is None


def test_every_short_name_finds_its_own_datasheet() -> None:
    assert all(get_accelerator(name) is ACCELERATORS[name] for name in ACCELERATORS)


def test_rates_and_memory_of_this_machine() -> None:
    small = measure_matmul(CPU, torch.float32, 0.01, size=64)
    assert 1e6 < small < 1e15
    assert 1e7 < measure_bandwidth(CPU, 0.01) < 1e14
    assert 0 < available_memory(CPU) <= total_memory(CPU)
    assert device_name(CPU)
    assert peak_memory(CPU) >= resident_memory() > 2**25
