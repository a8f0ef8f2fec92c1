"""Where the Triton kernels can be used."""

from importlib.util import find_spec


def triton_takes(device, head_dim):
    return device.type == "cuda" and head_dim % 8 == 0 and 16 <= head_dim <= 256 and find_spec("triton") is not None
