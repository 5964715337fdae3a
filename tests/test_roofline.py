"""``python -m benchmarks.roofline``: what it counts, by hand; on an emulated GPU in ``kernels/test_counted.py``."""

# ruff: noqa: E402 - what needs Triton is imported once it is known to be there
from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("acsconv")
torchvision = pytest.importorskip("torchvision")

import acs_triton
from acs_triton.arguments import conv_params
from benchmarks.roofline import __main__ as report
from benchmarks.roofline import bounds, layers
from benchmarks.roofline.bounds import GPUS, Step
from benchmarks.roofline.counts import count
from benchmarks.roofline.launches import Launch, Operation, record
from benchmarks.roofline.layers import Layer
from benchmarks.roofline.traffic import Work

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET replaces the launches")

A100, HALF = GPUS["a100"], 2
CPU = torch.device("cpu")


def layer(in_channels, out_channels, size, kernel=3, stride=1, groups=1, batch=1, bias=False):
    params = conv_params((kernel, kernel), out_channels, stride, kernel // 2, 1, groups, None)
    return Layer(in_channels, out_channels, params, size, batch, bias)


def launches(one: Layer, primitive: str) -> list[Launch]:
    with bounds.counting(A100):
        events = layers.ours(one, primitive, torch.float16, CPU)
    return [event for event in events if isinstance(event, Launch)]


def nearly(value: int, least: int) -> bool:
    """Tables add less than a hundredth."""
    return least < value < 1.01 * least


# 64 -> 3 x 64 channels on 4 x 4 x 8 positions: every tile is full. Of a tap's 128 positions, those beyond an
# edge are not loaded: 3, 4, 3 of 4 and 7, 8, 7 of 8.
FULL = layer(64, 192, (4, 4, 8))
POSITIONS = 4 * 4 * 8
LOADED = 4 * 10 * 22 + 4 * 10 * 22 + 8 * 10 * 10
WEIGHTS = 192 * 64 * 9


def test_a_convolution():
    _, launch = launches(FULL, "conv")
    work, tile = count(launch), launch.arguments
    assert launch.programs == POSITIONS // tile["BM"] * 192 // tile["BN"]
    assert work.matrix == FULL.multiply_adds == POSITIONS * WEIGHTS
    assert nearly(work.loaded, LOADED * 64 * HALF * (64 // tile["BN"]) + WEIGHTS * HALF * (POSITIONS // tile["BM"]))
    assert work.stored == work.written == POSITIONS * 192 * HALF
    assert nearly(work.read, (POSITIONS * 64 + WEIGHTS) * HALF)


@pytest.mark.parametrize("primitive", ["conv", "input_grad"])
def test_packed_weights(primitive):
    """Every weight is read and written once: all of their tiles are full."""
    packed, *_ = launches(FULL, primitive)
    work = count(packed)
    tables = packed.arguments["p_numbers"].numel() * 4
    assert packed.kernel == "pack_kernel"
    assert work.written == work.stored == WEIGHTS * HALF
    assert WEIGHTS * HALF < work.read <= WEIGHTS * HALF + 2 * tables
    assert WEIGHTS * HALF <= work.loaded < 1.2 * WEIGHTS * HALF
    assert work.matrix == 0


def test_padded_channels():
    """24 channels are read as 32, 40 are written as a whole number of tiles."""
    _, launch = launches(layer(24, 40, (4, 4, 8), kernel=1), "conv")
    columns = -(-40 // launch.arguments["BN"]) * launch.arguments["BN"]
    assert launch.arguments["BK"] == 32
    assert count(launch).matrix == POSITIONS * columns * 32
    assert count(launch).stored == count(launch).written == POSITIONS * 40 * HALF


def test_an_input_gradient_at_a_stride():
    """Each of the 8 classes of positions has the taps that reach it: 27 in all."""
    one = layer(64, 192, (8, 8, 16), stride=2)
    _, launch = launches(one, "input_grad")
    work = count(launch)
    assert work.matrix == one.multiply_adds == POSITIONS * WEIGHTS
    assert work.stored == 8 * POSITIONS * 64 * HALF


def test_a_weight_gradient():
    main, total = launches(FULL, "weight_grad")
    work, tile = count(main), main.arguments
    splits = main.programs // tile["jobs"]
    assert work.matrix == FULL.multiply_adds
    # Tiles of three taps load the output gradient once.
    gradient = POSITIONS * 192 * HALF * 9 // tile["TAPS"]
    assert nearly(work.loaded, LOADED * 64 * HALF * (64 // tile["BO"]) + gradient)
    assert work.written == work.stored == WEIGHTS * 4 * splits
    assert (count(total).loaded, count(total).written) == (WEIGHTS * 4 * splits, WEIGHTS * HALF)


def test_a_depthwise_convolution():
    one = layer(96, 96, (8, 8, 16), groups=96)
    (launch,) = launches(one, "conv")
    work, tile = count(launch), launch.arguments
    assert (work.matrix, work.scalar) == (0, one.multiply_adds)  # 32 channels a view: whole windows
    assert work.stored == work.written == 8 * 8 * 16 * 96 * HALF
    boxes = 8 * 8 * 16 // (tile["ROWS"] ** 2 * tile["WIDTH"])
    assert launch.programs == boxes * 96 // tile["CHANNELS"]
    # One box along D and H, so that only the halo along W is loaded again, by the two views that slide there.
    assert tile["ROWS"] == 8
    halo = 2 * (16 // tile["WIDTH"] - 1)
    assert 0 < work.loaded - 8 * 8 * HALF * (16 * 96 + halo * 64) <= launch.programs * 1024


def test_a_stem():
    one = layer(3, 48, (8, 8, 16))
    (launch,) = launches(one, "conv")
    assert count(launch).matrix == 8 * 8 * 16 * 48 * 32  # 27 pairs of channel and tap, padded
    assert count(launch).stored == 8 * 8 * 16 * 48 * HALF


def test_least_bytes():
    """A 1x1 kernel at a stride reads one position of eight; 3x3 views together all those with an even coordinate."""
    strided = layer(16, 32, (8, 8, 8), kernel=1, stride=2)
    assert strided.least_bytes("conv", torch.float16) == HALF * (64 * 16 + 16 * 32 + 64 * 32)
    assert strided.least_bytes("input_grad", torch.float16) == HALF * (512 * 16 + 16 * 32 + 64 * 32)
    odd = 4 * 4 * 4  # positions all of whose coordinates are odd are read by no view
    three = layer(16, 48, (8, 8, 8), stride=2)
    assert three.least_bytes("conv", torch.float16) == HALF * ((512 - odd) * 16 + 16 * 48 * 9 + 64 * 48)
    depthwise = layer(3 * 8, 3 * 8, (8, 8, 8), stride=2, groups=24)
    assert depthwise.least_bytes("conv", torch.float16) == HALF * (256 * 24 + 24 * 9 + 64 * 24)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_published_chain(batch):
    one = layer(64, 64, (16, 16, 16), batch=batch, bias=True)
    found = bounds._published(one, ["conv", "input_grad", "weight_grad"], torch.float16)
    moved = {primitive: bounds.moved(steps) for primitive, steps in found.items()}
    x, w, b = batch * 16**3 * 64 * HALF, 64 * 64 * 9 * HALF, 64 * HALF
    copies = 2 * x if batch > 1 else 0  # of the parts of the gradient: channels [a, b) of several samples
    # Three convolutions, a concatenation, the bias.
    assert moved["conv"] == (4 * x + w) + 2 * x + (2 * x + b)
    # Three convolutions, two additions of the whole gradient.
    assert moved["input_grad"] == copies + (4 * x + w) + 6 * x
    # Three convolutions; three parts each padded to the whole weight, and added; the sum for the bias.
    assert moved["weight_grad"] == (4 * x + w) + (w + 3 * w) + 6 * w + (x + b)
    assert sum(step.work.matrix for steps in found.values() for step in steps) == 3 * one.multiply_adds


def test_what_the_published_operator_cannot_do_is_left_out():
    assert bounds._published(layer(8, 8, (6, 6, 6), groups=2), ["conv"], torch.float16) is None


def test_bounds():
    work = Work(matrix=156 * 10**6, scalar=0, loaded=0, stored=0, read=2039, written=0)
    assert Step(work).bound(A100, torch.float16) == (pytest.approx(1e-6), "tensor cores")
    assert Step(work, programs=27).bound(A100, torch.float16) == (pytest.approx(4e-6), "tensor cores")
    assert Step(Work(read=2039 * 10**3, written=2039 * 10**3)).bound(A100, torch.float16) == (
        pytest.approx(2e-6),
        "DRAM",
    )
    with bounds.counting(A100):
        tf32 = Step(work).bound(A100, torch.float32)
    assert tf32 == (pytest.approx(2e-6), "tensor cores")
    l2 = Step(Work(loaded=64 * 108 * 1410), programs=108)
    assert l2.bound(A100, torch.float16) == (pytest.approx(1e-6), "L2")


def test_every_call_of_a_network_is_found():
    calls = layers.calls("resnet18", (32, 32, 32), 2)
    forward = {one: n for (one, primitive), n in calls.items() if primitive == "conv"}
    assert sum(forward.values()) == 20
    assert sum(n for (_, primitive), n in calls.items() if primitive == "input_grad") == 19  # not of the image
    with torch.device("meta"):
        network, volume = torchvision.models.resnet18(), torch.empty(2, 3, 32, 32, 32)
    described = acs_triton.describe(network, volume, show=False)
    flops = sum(operation.flops for operation in described.operations if operation.name == "conv2d")
    assert sum(one.multiply_adds * n for one, n in forward.items()) == flops // 2


def test_pointwise_convolutions_are_pytorchs():
    with torch.device("meta"):
        network = acs_triton.convert(
            torch.nn.Sequential(torch.nn.Conv2d(4, 6, 1), torch.nn.Conv2d(6, 8, 1, bias=False))
        )
    counter = layers._Calls(2)
    with counter:
        network(torch.empty(2, 4, 3, 5, 7, device="meta")).sum().backward()
    found = {(one.in_channels, one.bias, primitive): one for one, primitive in counter.calls}
    # The image needs no gradient.
    assert {key[::2] for key in found} == {
        (4, "conv"),
        (6, "conv"),
        (4, "weight_grad"),
        (6, "weight_grad"),
        (6, "input_grad"),
    }
    assert all(one.planar and (one.batch, one.size) == (2, (3, 5, 7)) for one in found.values())
    assert {key[:2] for key in found} == {(4, True), (6, False)}
    (operation,) = layers.ours(found[6, False, "conv"], "conv", torch.float16, CPU)
    ((_, step),) = bounds.steps_of(operation)
    voxels = 2 * 3 * 5 * 7
    assert step.work == Work(matrix=voxels * 48, read=HALF * (voxels * 6 + 48), written=HALF * voxels * 8)


def test_operations_are_recorded():
    x = torch.zeros(4, 6)
    events = record(lambda: torch.cat([x.t(), x.expand(3, 4, 6)[0].t()]).add_(1))
    assert [(event.name, event.read, event.written) for event in events] == [("cat", 192, 192), ("add_", 192, 192)]
    assert all(isinstance(event, Operation) for event in events)


def test_an_unknown_kernel_is_named():
    with pytest.raises(NotImplementedError, match="no count is known for other_kernel"):
        count(Launch("other_kernel", 1, {}))


def test_the_report(capsys):
    report.main(["--network", "unet", "--size", "8", "--gpu", "a100"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "unet, volumes 1 x 8 x 8 x 8, fp16, A100 SXM 80 GB"
    rows = [text.split("  ")[0] for text in lines[3 : lines.index("", 3)]]
    assert "64->128 k3 4^3" in rows
    assert "sum of dense 3x3" in rows
    assert any("312 TFLOP/s" in text for text in lines)


@pytest.mark.parametrize("arguments", [["--size", "8", "8"], ["--size", "0"], ["--batch", "0"], ["--gpu", "v100"]])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(SystemExit):
        report.main(arguments)
