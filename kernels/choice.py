"""Where the Triton kernels can be used."""

from importlib.util import find_spec

HEAD_DIMS = range(16, 257, 8)
TAKEN_HEAD_DIMS = f"from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]} that is a multiple of {HEAD_DIMS.step}"


def triton_takes(device, head_dim):
    return device.type == "cuda" and head_dim in HEAD_DIMS and find_spec("triton") is not None
