"""The device a program runs on: which one, in what precision, and how fast it could be at best."""

import re
import resource
import sys
from pathlib import Path

import torch

from config import UserError

# Dense bf16 matrix products without sparsity, TFLOP/s, from the vendors' data sheets. A name counts where only a memory size
# or a form like "-SXM4-40GB" follows: the RTX 4090 Laptop GPU is another one, and a MIG slice is a part of one.
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "B200": 2250,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10G": 70,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
WHOLE_GPU = r"( \d+GB?[\w ]*|-(SXM|PCIE)[\w-]*)?$"


def pick_device(name, index=0):
    """A torch.device for the key `device`: auto takes cuda, then mps, then cpu; `index` is the GPU of this process."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there[name]:
        raise UserError(f"device={name} is not available here; take device=auto or one of {[k for k in there if there[k]]}")
    return torch.device(name, index) if name == "cuda" else torch.device(name)


def pick_dtype(name, device):
    """A torch dtype for the key `dtype`: auto takes bfloat16 on GPUs that have it, else float32."""
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if native else "float32"
    return getattr(torch, name)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device):
    """Peak FLOP/s of the device in bf16, or None when it is not in the table: then no MFU is shown."""
    name = device_name(device)
    return next((tera * 1e12 for known, tera in PEAK_TFLOPS.items() if re.search(rf"\b{known}{WHOLE_GPU}", name)), None)


def peak_memory_gib(device):
    """Most memory in use so far: of the device on CUDA, of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text() if status.exists() else "")
    if found:  # Linux, whose ru_maxrss begins with that of the process that started this one
        return int(found[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
