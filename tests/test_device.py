"""The device: automatic choice, refusal of what is not there, peaks by name."""

import pytest
import torch
from util import script

import device
from config import UserError


def test_auto_takes_the_best_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.pick_device("auto", 3) == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.pick_device("auto") == torch.device("mps")
    assert device.pick_device("cpu") == torch.device("cpu")
    assert device.pick_dtype("auto", torch.device("cpu")) == torch.float32


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda"):
        device.pick_device("cuda")


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("GRID A100-10C", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA GB200", None),  # faster than a B200
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-16GB", None),  # has no bf16
        ("Voodoo 2", None),
    ],
)
def test_peaks_by_name(monkeypatch, name, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert device.peak_flops(torch.device("cuda")) == (tera and tera * 1e12)
    assert device.peak_flops(torch.device("cpu")) is None


def test_peak_memory_counts_what_was_held():
    """In a process of its own: what other tests held would hide it."""
    hold = "peak = lambda: device.peak_memory_gib(torch.device('cpu')); before = peak(); torch.ones(2**27)"  # half a GiB
    result = script("-c", f"import device, torch; {hold}; print(peak() - before)")
    assert 0.3 < float(result.stdout) < 0.9
