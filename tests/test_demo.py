"""The demo: its data split, loss, Dice and options, and a short run of the whole."""

import re
from itertools import pairwise

import pytest
import torch

from acs_triton.demo import __main__ as command
from acs_triton.demo.data import CLASSES, STRUCTURES, Brain, Crops, alternating_slabs, load_brain

CROP = (8, 12, 16)


def skip_without_packages():
    if missing := command.missing_packages():
        pytest.skip(f"the demo's packages are not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def brain():
    skip_without_packages()
    return load_brain()


def toy_brain(length=60):
    """Random labels, and an image that holds its own positions."""
    shape = (length, 20, 24)
    labels = torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(0))
    return Brain(torch.arange(labels.numel(), dtype=torch.float64).reshape(shape), labels)


@pytest.mark.parametrize(
    ("length", "train", "test", "gap"), [(124, 16, 16, 2), (60, 8, 6, 1), (59, 10, 3, 0), (9, 9, 4, 2)]
)
def test_slabs_alternate_with_gaps(length, train, test, gap):
    slabs = alternating_slabs(length, train, test, gap)
    in_order = sorted(slabs[0] + slabs[1], key=lambda slab: slab.start)
    assert in_order[0].start == 0
    assert in_order[-1].stop <= length < in_order[-1].stop + gap + max(train, test)
    assert in_order[::2] == slabs[0]
    assert in_order[1::2] == slabs[1]
    assert [len(slab) for slab in slabs[0] + slabs[1]] == [train] * len(slabs[0]) + [test] * len(slabs[1])
    for before, after in pairwise(in_order):
        assert after.start - before.stop == gap


def test_no_training_crop_holds_a_voxel_outside_the_training_slabs():
    brain = toy_brain()
    train, _ = alternating_slabs(60, 10, 8, 1)
    outside = torch.ones(60, dtype=torch.bool)
    for slab in train:
        outside[slab.start : slab.stop] = False
    brain.image[outside] = torch.nan
    brain.labels[outside] = -1
    crops = Crops(brain, train, CROP, seed=0)
    batches = [crops.batch(2) for _ in range(200)]
    assert all(image.shape == (2, *CROP) and image.isfinite().all() and labels.min() >= 0 for image, labels in batches)
    seen = torch.cat([image.flatten() for image, _ in batches]).unique()
    assert len(seen) > 0.99 * sum(len(slab) for slab in train) * 20 * 24, "only corners may come up so rarely"


def test_crops_are_balanced_and_repeatable():
    brain = toy_brain()
    brain.labels[:] = 0
    brain.labels[:, :, :6] = 6
    brain.labels[3, 4, 20] = 1  # one voxel against thousands
    slabs = [range(10)]
    windows = [Crops(brain, slabs, CROP, seed=1).window() for _ in range(2)]
    assert windows[0] == windows[1]
    crops = Crops(brain, slabs, CROP, seed=1)
    rare = sum(bool((brain.labels[crops.window()] == 1).any()) for _ in range(200))
    assert rare > 80


def test_every_structure_is_on_both_sides_of_the_split(brain):
    assert brain.image.shape == brain.labels.shape
    assert brain.image.dtype == torch.float32
    assert brain.image.min() >= 0
    assert brain.image.max() <= 1
    for slabs in alternating_slabs(len(brain.image), command.SEEN, command.HELD_OUT, command.GAP):
        voxels = torch.bincount(torch.cat([brain.part(slab).labels.flatten() for slab in slabs]), minlength=CLASSES)
        assert voxels.min() > 1000, dict(zip(STRUCTURES, voxels[1:].tolist(), strict=True))
    # Left and right must be where they are in the labels: each structure is symmetric to within a few mm.
    across = torch.arange(brain.labels.shape[2], dtype=torch.float64)
    middle = (len(across) - 1) / 2
    for number in range(1, CLASSES):
        inside = (brain.labels == number).sum((0, 1)).double()
        assert abs((inside * across).sum() / inside.sum() - middle) < 3


def test_dice():
    training = pytest.importorskip("acs_triton.demo.training", exc_type=ImportError)
    labels = torch.tensor([0, 1, 1, 1, 2, 2, 3, 0])
    prediction = torch.tensor([0, 1, 1, 2, 2, 2, 0, 1])
    found = training.dice(prediction, labels)
    assert found.shape == (CLASSES - 1,)
    assert found[:3].tolist() == pytest.approx([2 * 2 / (3 + 3), 2 * 2 / (2 + 3), 0])
    assert found[3:].isnan().all()
    assert training.dice(labels, labels)[:3].tolist() == [1, 1, 1]


def test_loss_is_cross_entropy_plus_soft_dice():
    training = pytest.importorskip("acs_triton.demo.training", exc_type=ImportError)
    labels = torch.randint(0, CLASSES, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    right = 50 * torch.nn.functional.one_hot(labels, CLASSES).movedim(-1, 1).double()
    assert training.segmentation_loss(right, labels) < 1e-9
    even = torch.zeros_like(right)
    voxels = torch.bincount(labels.flatten(), minlength=CLASSES)[1:].double()
    soft_dice = (2 * voxels / CLASSES + 1) / (labels.numel() / CLASSES + voxels + 1)
    expected = torch.tensor(float(CLASSES)).double().log() + 1 - soft_dice.mean()
    assert training.segmentation_loss(even, labels).item() == pytest.approx(expected.item())
    absent = even.clone().requires_grad_()
    training.segmentation_loss(absent, torch.zeros_like(labels)).backward()
    assert absent.grad.isfinite().all()


def test_each_slab_is_segmented_inside_a_window():
    training = pytest.importorskip("acs_triton.demo.training", exc_type=ImportError)
    image = torch.randint(0, CLASSES, (60, 5, 6), generator=torch.Generator().manual_seed(0))
    given = []

    class Network(torch.nn.Module):
        def forward(self, volume):
            given.append(volume)
            return torch.nn.functional.one_hot(volume, CLASSES).movedim(-1, 1)

    slabs = [range(2, 8), range(30, 36), range(54, 60)]
    labels = training.segment(Network(), image, slabs, 12)
    windows = [range(12), range(27, 39), range(48, 60)]
    assert all(torch.equal(part[0], image[window]) for part, window in zip(given, windows, strict=True))
    expected = torch.zeros_like(labels)
    for slab in slabs:
        expected[slab] = image[slab]
    assert torch.equal(labels, expected)


def test_published_layers_compute_the_same():
    skip_without_packages()
    from acsconv.operators import ACSConv as Published

    from acs_triton.demo import timing

    torch.manual_seed(0)
    ours, published = timing.pair()
    assert sum(isinstance(layer, Published) for layer in published.modules()) > 30
    image = torch.rand(1, 16, 32, 32)
    with torch.no_grad():
        expected = published.eval()(image)
        torch.testing.assert_close(ours.eval()(image), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_options(tmp_path):
    default = command.options([])
    assert (default.steps, default.seed) == (150, 0)
    chosen = command.options(["--steps", "7", "--seed", "3", "--output", str(tmp_path / "a.png"), "--device", "cpu"])
    assert (chosen.steps, chosen.seed, chosen.output) == (7, 3, tmp_path / "a.png")
    assert chosen.device == torch.device("cpu")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--steps", "few"],
        ["--output", "no/folder/a.png"],
        ["--output", "a.jpg"],
        ["--seed", "x"],
        ["--device", "abacus"],
    ],
    ids=" ".join,
)
def test_bad_options_are_named(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command.options(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert arguments[0] in message
    assert arguments[1] in message


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "nilearn" else object())
    assert command.main([]) == 1
    message = capsys.readouterr().err
    assert "nilearn" in message
    assert 'pip install -e ".[demo]"' in message
    assert "tqdm" not in message


def test_interrupt_leaves_a_message(monkeypatch, capsys):
    def interrupted(choice):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "find_spec", lambda name: object())
    monkeypatch.setattr(command, "run", interrupted)
    assert command.main(["--output", "some.png"]) == 130
    assert "some.png was not written" in capsys.readouterr().err


def test_short_run(brain, tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.setattr(command, "CROP", (16, 48, 48))
    monkeypatch.setattr(command, "TIMED_STEPS", 1)
    picture = tmp_path / "demo.png"
    assert command.main(["--steps", "2", "--output", str(picture), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert float(re.search(r"relative error (\S+)", printed)[1]) < 1e-5
    assert float(re.search(r"losses differ by (\S+)", printed)[1]) < 1e-3
    for structure in STRUCTURES:
        assert len(re.search(rf"Dice, {structure} +([\d.]+) +([\d.]+)", printed).groups()) == 2
    assert "a demonstration, not a result" in printed
    with Image.open(picture) as image:
        assert min(image.size) > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 1000
