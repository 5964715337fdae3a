"""Convolutions in PyTorch's own operators: the same numbers, also in graphs of dynamic sizes, and in ONNX."""

import threading

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import acs_triton.functional as ours
from acs_triton import standard_operators
from acs_triton.operators import ACSConv, Conv2_5d, SoftACSConv
from tests.strategies import acs_arguments


@given(acs_arguments(), st.booleans())
def test_same_numbers(case, aligned):
    torch.manual_seed(0)
    options = {**case["options"], "split": case["split"], "aligned": aligned}
    x, weight = (torch.randn(case[name], dtype=torch.float64) for name in ("shape", "weight"))
    bias = torch.randn(len(weight), dtype=torch.float64)
    try:
        expected = ours.acs_conv3d(x, weight, bias, **options)
    except ValueError:
        assume(False)
    with standard_operators():
        found = ours.acs_conv3d(x, weight, bias, **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


CALLS = [
    ((3, 3), {"padding": 1}),
    ((3, 3), {"padding": "same", "dilation": 2, "groups": 2}),
    ((2, 2), {"padding": "same"}),
    ((3, 5), {"padding": (0, 1), "stride": 3, "split": (1, 5, 0)}),
    ((2, 2), {"stride": 2, "aligned": True}),
    ((1, 1), {"stride": 2}),
    ((3, 3), {"padding": 4}),
    # These place the through-plane sample by the size's parity.
    ((2, 2), {"stride": 2, "groups": 2}),
    ((4, 4), {"stride": (1, 2, 2), "padding": (0, 1, 1)}),
    ((3, 3), {"stride": 2, "padding": 2, "dilation": 2}),
]


def test_one_graph_for_all_sizes():
    weights = [torch.randn(6, 4 // call.get("groups", 1), *kernel).double() for kernel, call in CALLS]

    def convolutions(x):
        return [ours.acs_conv3d(x, weight, **call) for weight, (_, call) in zip(weights, CALLS, strict=True)]

    def traced(x):
        with standard_operators():
            return convolutions(x)

    shapes = [(1, 4, 12, 13, 14), (1, 4, 13, 12, 11), (1, 4, 7, 20, 9), (1, 4, 8, 6, 6)]
    graph = make_fx(traced, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(shapes[0]).double())
    assert not any("acs_triton" in str(node.target) for node in graph.graph.nodes)
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64)
        for found, expected in zip(graph(x), convolutions(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_block_ends_and_is_this_threads():
    layer, x = ACSConv(1, 3, 3), torch.randn(1, 1, 5, 5, 5)

    def operators():
        graph = make_fx(layer)(x)
        return {str(node.target) for node in graph.graph.nodes if "conv" in str(node.target)}

    own, plain = {"acs_triton.conv.default"}, {"aten.convolution.default"}
    assert operators() == own
    with standard_operators():
        with standard_operators():
            pass
        assert operators() == plain
        found = []
        thread = threading.Thread(target=lambda: found.append(operators()))
        thread.start()
        thread.join()
        assert found == [own]
    assert operators() == own


def layers():
    return nn.Sequential(
        ACSConv(2, 8, 3, padding=1),
        nn.InstanceNorm3d(8, affine=True),
        nn.ReLU(),
        ACSConv(8, 8, 2, stride=2, groups=4, acs_kernel_split=(3, 2, 3)),
        SoftACSConv(8, 6, 3, padding=1, padding_mode="reflect"),
        SoftACSConv(6, 6, (3, 5), padding=(1, 2), mean=True),
        Conv2_5d(6, 4, 3, unsqueeze_axis=-1),
        ACSConv(4, 2, 1, stride=2),
    ).eval()


def test_exported_for_dynamic_sizes():
    net, sizes = layers(), dict.fromkeys((2, 3, 4), torch.export.Dim.AUTO)
    with standard_operators(), torch.no_grad():
        exported = torch.export.export(net, (torch.randn(1, 2, 12, 14, 13),), dynamic_shapes=(sizes,))
    assert not any("acs_triton" in str(node.target) for node in exported.graph.nodes)
    for size in ((12, 14, 13), (13, 15, 12), (20, 11, 17)):
        x = torch.randn(1, 2, *size)
        torch.testing.assert_close(exported.module()(x), net(x), rtol=1e-4, atol=1e-5)


def test_onnx():
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net, sizes = layers(), dict.fromkeys((2, 3, 4), torch.export.Dim.AUTO)
    with torch.no_grad():
        program = torch.onnx.export(
            net, (torch.randn(1, 2, 12, 14, 13),), dynamo=True, dynamic_shapes=(sizes,), verbose=False
        )
    assert {node.domain for node in program.model.graph} == {""}
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in ((12, 14, 13), (13, 15, 12), (20, 11, 17)):
        x = torch.randn(1, 2, *size)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), net(x), rtol=1e-4, atol=1e-5)
