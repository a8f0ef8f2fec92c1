"""Matrix products on a CPU: `nn.Linear` through oneDNN, which torch brings along.

torch hands float32 products on x86 to MKL, which on AMD reads the weights of a single row with one core and is slow
for more. On 2 cores of an AMD EPYC oneDNN takes, for all products of GPT-2 124M, 14 ms a token instead of 30 and 25 ms
for 16 tokens instead of 60; for the products of a training step 1.4 to 1.9 times less.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

WORTH_IT = 2**19  # multiplications; below, oneDNN's own work for a call (about 15 us) costs more than it saves


class Linear(nn.Linear):
    """`nn.Linear`, through oneDNN where that is faster: float32 on a CPU, and not tiny. Compiled, in the form that gives the
    compiler most to choose from."""

    def forward(self, x):
        if torch.compiler.is_compiling():  # the compiler chooses for itself, and cannot trace the questions below
            if self.bias is not None and x.numel() == self.in_features:
                # for a single row Inductor writes a kernel of its own, but not for one with a bias (see compile_for_decoding)
                product = F.linear(x, self.weight)
                return product + self.bias.to(product.dtype)  # autocast makes the product bfloat16
        elif (
            x.device.type == "cpu"
            and x.dtype == torch.float32
            and x.numel() * self.out_features >= WORTH_IT
            and torch.backends.mkldnn.is_available()
            and not torch.is_autocast_enabled("cpu")
        ):
            return Product.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class Product(torch.autograd.Function):
    """x weight^T + bias and its gradients: x (..., in), weight (out, in), bias (out,) or None, to (..., out)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_bias = grad_rows.sum(dim=0) if ctx.needs_input_grad[2] else None
        return multiply(grad, weight.t()), multiply(grad_rows.t(), x.reshape(-1, x.shape[-1]).t()), grad_bias


def multiply(x, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
