"""The CPU's matrix products: the same numbers as nn.Linear, with gradients as before."""

import pytest
import torch
from torch import nn

from kernels import linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """Counts the products that go to oneDNN."""
    calls, real = [], torch.ops.mkldnn._linear_pointwise

    def counted(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_as_good_as_nn_linear(rows, bias, calls):
    torch.manual_seed(0)
    layer = linear.Linear(768, 1000, bias=bias)
    x = torch.randn(1, rows, 768)
    with torch.no_grad():
        out, plain = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
        truth = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert calls and out.shape == plain.shape
    assert torch.linalg.norm(out - truth) <= 2 * torch.linalg.norm(plain - truth)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_as_good_as_nn_linear(bias, calls):
    torch.manual_seed(0)
    layer = linear.Linear(256, 300, bias=bias)
    x, grad = torch.randn(4, 32, 256, requires_grad=True), torch.randn(4, 32, 300)

    def gradients(product, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, *layer.parameters())]
        return torch.autograd.grad(product(*inputs), inputs, grad.to(dtype))

    ours = torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)
    assert len(calls) == 3
    plain, truth = gradients(nn.functional.linear, torch.float32), gradients(nn.functional.linear, torch.float64)
    for a, b, c in zip(ours, plain, truth):
        assert torch.linalg.norm(a - c) <= 2 * torch.linalg.norm(b - c)


def test_a_single_vector_and_no_second_derivative(calls):
    layer, x = linear.Linear(768, 1000), torch.randn(768, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    assert calls and torch.allclose(grad, layer.weight.sum(dim=0), atol=1e-4)
    with pytest.raises(RuntimeError):  # rather than a wrong one
        grad.sum().backward()


def test_small_products_half_precision_and_autocast_go_through_torch(calls):
    with torch.no_grad():
        linear.Linear(8, 8)(torch.randn(4, 8))
        assert linear.Linear(768, 1000).bfloat16()(torch.randn(4, 768).bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert linear.Linear(768, 1000)(torch.randn(4, 768)).dtype == torch.bfloat16
    assert not calls


@pytest.mark.parametrize("rows", [1, 5])
def test_compiled_in_one_graph_where_a_single_row_has_its_bias_added_behind(rows, calls):
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    layer = linear.Linear(768, 1000)
    x = torch.randn(rows, 768)
    out = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)(x)
    assert torch.allclose(out, nn.functional.linear(x, layer.weight, layer.bias), atol=1e-4)
    assert not calls and len(graphs) == 1 and ("operator.add" in graphs[0]) == (rows == 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.compile(layer, backend=backend, fullgraph=True)(x).dtype == torch.bfloat16
