"""Forward and backward passes of small shapes, for NVIDIA's compute-sanitizer to watch."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from kernels.flash_attention import flash_attention

for T_q, T_k, H_kv, D, window in (
    (128, 128, 4, 64, 0),
    (100, 130, 2, 64, 0),
    (130, 200, 1, 64, 40),
    (65, 65, 1, 80, 0),
    (70, 260, 2, 128, 0),
    (130, 130, 2, 128, 40),
):
    qkv = torch.randn(1, T_k, 4 + 2 * H_kv, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = qkv.split([4, H_kv, H_kv], dim=2)
    flash_attention(q[:, T_k - T_q :], k, v, window).sum().backward()
    torch.cuda.synchronize()
