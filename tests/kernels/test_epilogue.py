"""Activations at the end of the convolutions' kernels: against the definition in float64, one rounding at the end."""

import pytest
import torch
import torch.nn.functional as F

from acs_triton import ops, use_backend
from acs_triton.activations import ACTIVATIONS, activate
from acs_triton.geometry import ConvParams
from acs_triton.kernels import depthwise, descriptor_gemm, gather_gemm, stem

from . import oracle
from .cases import LAYOUTS, Case

FAMILIES = {
    "gather_gemm": (gather_gemm, Case(16, 24, (2, 3, 5))),
    "gather_gemm, channels not last": (gather_gemm, Case(5, 7, (2, 3, 4), layout="ncdhw")),
    "gather_gemm, mixed views": (gather_gemm, Case(8, 6, (2, 3, 4), split=())),
    "depthwise": (depthwise, Case(6, 12, (2, 2, 3), groups=6, batch=1)),
    "stem": (stem, Case(3, 7, (2, 3, 4))),
}


def operands(case, make, dtype):
    x, bias = make(case.input_shape, dtype, 1, LAYOUTS[case.layout]), make((case.out_channels,), dtype, 3)
    return x, make(case.weight_shape, dtype, 2), bias


def check(family, activation, make, dtype):
    module, case = FAMILIES[family]
    tensors = operands(case, make, dtype)
    result = module.conv(*tensors, case.geometry, activation)
    expected = activate(oracle.conv(*tensors, case.geometry), activation)
    # No activation is steeper than 1.13; its own error is some roundings of its argument.
    magnitude = 2 * oracle.conv(*map(oracle.absolute, tensors), case.geometry)
    oracle.check(result, expected, magnitude, tensors[1][0].numel() + 1, merged=case.geometry.mixed)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, activation, make, main_dtype):
    check(family, activation, make, main_dtype)


def test_dtypes(make, dtype):
    check("stem", "gelu", make, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_values(activation, make, main_dtype):
    """Large arguments of both signs do not overflow on the way, and NaN stays NaN."""
    case = Case(3, 3, (1, 2, 2), kernel=(1, 1), padding=(0, 0), batch=1)
    values = torch.tensor([0, -0.5, -1, -4, -11, -88, -1000, -60000, 0.5, 3, 100, 60000], dtype=torch.float64)
    weight = make(case.weight_shape, main_dtype).copy_(torch.eye(3).view(3, 3, 1, 1))
    x = make(case.input_shape, main_dtype).copy_(values.view(case.input_shape))
    result = stem.conv(x, weight, None, case.geometry, activation)
    torch.testing.assert_close(result.double(), activate(x.double(), activation), rtol=2e-3, atol=2e-3)
    assert stem.conv(x.fill_(float("nan")), weight, None, case.geometry, activation).isnan().all()


@pytest.mark.parametrize("groups", [1, 6])
def test_operator_reaches_the_kernel(groups, make, main_dtype, monkeypatch):
    """Mixed views too, which the depthwise kernel computes one after the other: there the sum is activated."""
    case = Case(6, 6, (2, 3, 4), groups=groups, split=(), batch=1)
    tensors = operands(case, make, main_dtype)
    params = ConvParams((3, 3), (1,) * 3, (1,) * 4, (1,) * 4, (1,) * 4, groups, (), "acsconv")
    given = []
    for kernel in (gather_gemm, descriptor_gemm):
        monkeypatch.setattr(kernel, "conv", lambda *args, conv=kernel.conv: given.append(args[-1]) or conv(*args))
    with use_backend("triton"):
        result = ops.conv_act(*tensors, "silu", *params.args())
    assert given == (["silu"] if groups == 1 else [])
    magnitude = 2 * oracle.conv(*map(oracle.absolute, tensors), case.geometry)
    expected = F.silu(oracle.conv(*tensors, case.geometry))
    oracle.check(result, expected, magnitude, 4 * tensors[1][0].numel(), merged=True)
