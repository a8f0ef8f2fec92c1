import os

import torch

if not torch.cuda.is_available():
    # before any test imports triton: without a GPU its kernels run in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
