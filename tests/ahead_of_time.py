"""Compiles attention kernels for a GPU that is not there: python tests/ahead_of_time.py flash|paged ampere|hopper

The launchers run on CPU tensors; what they would launch is compiled instead, and must fit into the GPU's shared memory.
"""

import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).parent.parent))
from kernels import flash_attention, flash_tiles, paged_attention, paged_tiles

CAPABILITY = {"ampere": 80, "hopper": 90}
SHARED = {"ampere": 99 << 10, "hopper": 227 << 10}  # bytes of shared memory that one program may have


class Device:
    """In place of the driver of a real one."""

    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY[architecture], 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiled:
    """In place of a kernel."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(**arguments):
            compiled = self.kernel.warmup(grid=grid, **arguments)
            assert compiled.asm["cubin"] and compiled.metadata.shared <= SHARED[architecture], (self.kernel, compiled.metadata)

        return launch


def compile_instead(module, tiles, *kernels):
    tiles.on_hopper = lambda x: architecture == "hopper"
    for name in kernels:
        setattr(module, name, Compiled(getattr(module, name)))


def flash():
    compile_instead(flash_attention, flash_tiles, "_forward_kernel", "_dq_kernel", "_dkdv_kernel")
    for D, window, dtype in (
        (64, 0, torch.bfloat16),
        (80, 0, torch.bfloat16),
        (128, 100, torch.float16),
        (256, 0, torch.bfloat16),
        (32, 0, torch.float32),
        (256, 0, torch.float32),
    ):
        q, k, v = torch.zeros(1, 128, 8, D, dtype=dtype).split([4, 2, 2], dim=2)
        o, lse = flash_attention._forward._init_fn(q, k, v, window, 1.0)
        flash_attention._backward._init_fn(o, q, k, v, o, lse, window, 1.0)


def paged():
    compile_instead(paged_attention, paged_tiles, "_write_kernel", "_decode_kernel", "_prefill_kernel")
    for H, H_kv, D, page_size, window, dtype in (
        (12, 12, 64, 64, 0, torch.bfloat16),
        (6, 2, 80, 16, 100, torch.float16),
        (32, 1, 128, 64, 0, torch.bfloat16),
        (2, 2, 16, 16, 0, torch.float32),
        (2, 2, 32, 16, 0, torch.float32),
    ):
        q, k, v = torch.zeros(5, H + 2 * H_kv, D, dtype=dtype).split([H, H_kv, H_kv], dim=1)
        pages = torch.zeros(2, 3, page_size, H_kv, D, dtype=dtype)
        integers = [torch.zeros(size, dtype=torch.int32) for size in ((5, 3), 5, 6)]
        paged_attention.write(k, v, *pages, torch.zeros(5, dtype=torch.int64))
        for max_query_len in (1, 2):
            paged_attention.attend(q, *pages, *integers, window, 1.0, max_query_len, 4096)


architecture = sys.argv[2]
driver.set_active(Device())
{"flash": flash, "paged": paged}[sys.argv[1]]()
