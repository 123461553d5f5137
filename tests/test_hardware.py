"""Datasheets by name, and measured rates and memory of this machine."""

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
    ("name", "expected"),
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
def test_find_accelerator_by_device_name_or_short_name(name: str, expected: str) -> None:
    assert find_accelerator(name) is ACCELERATORS[expected]


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "AMD EPYC"]
)
def test_variants_are_not_mistaken_for_the_full_chip(name: str) -> None:
    assert find_accelerator(name) is None


def test_every_short_name_finds_its_datasheet() -> None:
    assert all(get_accelerator(name) is ACCELERATORS[name] for name in ACCELERATORS)


def test_measured_rates_and_memory_are_plausible() -> None:
    small = measure_matmul(CPU, torch.float32, 0.01, size=64)
    assert 1e6 < small < 1e15
    assert 1e7 < measure_bandwidth(CPU, 0.01) < 1e14
    assert 0 < available_memory(CPU) <= total_memory(CPU)
    assert device_name(CPU)
    assert peak_memory(CPU) >= resident_memory() > 2**25
