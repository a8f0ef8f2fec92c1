"""What launching a kernel takes on the host: layouts that the kernels can read, the GPU at hand, refusals."""

import torch
import triton

from kernels.choice import HEAD_DIMS, TAKEN_HEAD_DIMS

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on the CPU, in Python
SCALES = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # the kernels compute in float32


def on_hopper(x):
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def cdiv(a, b):  # triton's own are made for kernels; on the host they take 4 us a call
    return -(-a // b)


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()


def kernel_layout(x):
    """x itself where the kernels can read it: 16 bytes at once along D, which views of a fused projection allow."""
    aligned = x.data_ptr() % 16 == 0 and all(s % 8 == 0 and s > 0 for s, n in zip(x.stride()[:3], x.shape[:3]) if n > 1)
    return x if aligned and x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format)


def strides(x):
    """(batch, token, head); a dimension of size 1 has any stride, so it gets one that keeps the kernels' promises."""
    return tuple(s if n > 1 else 8 for s, n in zip(x.stride()[:3], x.shape[:3]))


def require(holds, name, value, takes):
    """Refuse what a kernel cannot do, naming the argument, its value, described if it is a tensor, and what is taken."""
    if not holds:
        raise ValueError(f"{name} is {described(value) if torch.is_tensor(value) else value}; it takes {takes}")


def described(x):
    strides = "" if x.is_contiguous() else f", strides {x.stride()}"
    return f"{tuple(x.shape)} {x.dtype} on {x.device}{strides}"


def require_computable(function, name, x, rank, axes):
    """What every attention kernel asks of its queries: rank, head size, dtype, device."""
    require(x.dim() == rank and x.numel() > 0, f"{function}: {name}.shape", tuple(x.shape), f"{rank} dimensions {axes}, none of them 0")
    D = x.shape[-1]
    require(D in HEAD_DIMS, f"{function}: {name}.shape[{rank - 1}]", D, f"a head size D {TAKEN_HEAD_DIMS}")
    known = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    require(known, f"{function}: {name}.dtype", x.dtype, "bfloat16, float16 or float32")
    somewhere = x.device.type == "cuda" or INTERPRETED
    require(somewhere, f"{function}: {name}.device", x.device, "an NVIDIA GPU, or the CPU under TRITON_INTERPRET=1")


def require_numbers(function, window, scale):
    require(isinstance(window, int) and window >= 0, f"{function}: window", window, "a whole number from 0 on, 0 for no limit")
    fits = scale is None or SCALES[0] <= scale <= SCALES[1]
    require(fits, f"{function}: scale", scale, "a number above 0 that float32 can hold")
