"""The Triton backend: what it makes of a call before a kernel sees it."""

import pytest
import torch

from acs_triton.backends import triton as backend
from acs_triton.kernels import layout_conversion
from acs_triton.layout import memory_format

from . import oracle
from .cases import LAYOUTS, Case


@pytest.fixture
def converted(monkeypatch):
    """Shapes of what is converted, as it is."""
    shapes, convert = [], layout_conversion.convert

    def record(tensor, groups=1):
        shapes.append(tuple(tensor.shape))
        return convert(tensor, groups)

    monkeypatch.setattr(layout_conversion, "convert", record)
    return shapes


def operands(case, make, dtype):
    format = LAYOUTS[case.layout]
    x, grad = make(case.input_shape, dtype, 1, format), make(case.output_shape, dtype, 2, format)
    return x, grad, make(case.weight_shape, dtype, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("size", "stride", "groups"),
    [((5, 6, 7), (2, 2, 2), 1), ((4, 3, 8), (1, 2, 3), 1), ((1, 2, 1), (2, 2, 2), 1), ((4, 5, 6), (2, 2, 2), 2)],
)
def test_a_1x1_convolution_at_a_stride(size, stride, groups, layout, make, main_dtype, converted):
    case = Case(16, 10, size, kernel=(1, 1), padding=(0, 0), stride=stride, groups=groups, layout=layout)
    x, grad, weight = operands(case, make, main_dtype)
    y = backend.conv(x, weight, None, case.geometry)
    assert memory_format(y) == memory_format(x)
    magnitude = oracle.conv(x.abs(), weight.abs(), None, case.geometry)
    oracle.check(y, oracle.conv(x, weight, None, case.geometry), magnitude, weight[0].numel())
    assert converted == ([(*x.shape[:2], *case.geometry.output_size)] if layout == "ncdhw" else []), "what is read"
    w = backend.weight_grad(grad, x, case.geometry)
    magnitude = oracle.weight_grad(grad.abs(), x.abs(), case.geometry)
    oracle.check(w, oracle.weight_grad(grad, x, case.geometry), magnitude, grad[:, 0].numel())


@pytest.mark.parametrize("padding", [(0, 0), (1, 1)])
def test_a_padded_1x1_convolution_keeps_its_stride(padding, make, main_dtype):
    """Its first output reads outside the input."""
    case = Case(8, 6, (4, 5, 6), kernel=(1, 1), padding=padding, stride=(2, 2, 2), rule="aligned")
    x, _, weight = operands(case, make, main_dtype)
    magnitude = oracle.conv(x.abs(), weight.abs(), None, case.geometry)
    y = backend.conv(x, weight, None, case.geometry)
    oracle.check(y, oracle.conv(x, weight, None, case.geometry), magnitude, weight[0].numel())


def test_both_gradients_convert_each_tensor_once(make, main_dtype, converted):
    case = Case(16, 12, (3, 4, 5), layout="ncdhw")
    x, grad, weight = operands(case, make, main_dtype)
    both = backend.gradients(grad, x, weight, case.geometry)
    assert converted == [tuple(grad.shape), tuple(x.shape)]
    expected = backend.input_grad(grad, weight, case.geometry), backend.weight_grad(grad, x, case.geometry)
    assert all(map(torch.equal, both, expected))
    assert len(converted) == 5, "kept for one call only"


def test_what_shares_an_address_is_converted_by_itself(make, main_dtype):
    """A tensor and its own transpose, in one call."""
    x = make((1, 8, 4, 4, 4), main_dtype)
    with backend.channels_last.converted_once():
        found = [backend.channels_last.channels_last(one) for one in (x, x.transpose(2, 4), x[:, :4], x)]
    assert torch.equal(found[0], x)
    assert torch.equal(found[1], x.transpose(2, 4))
    assert torch.equal(found[2][:, :4], x[:, :4])
    assert found[3] is found[0]
