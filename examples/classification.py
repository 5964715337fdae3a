"""Classification and regression of volumes with a 2D network, converted: one label or a few numbers for each.

Without --data the volumes are blocks of 64 mm of brain templates (examples/brains.py), and a network
learns which structure the middle of a block lies in (--target structure) or where in the brain it
is, in mm of MNI space (--target position). It is trained on two templates and judged on the third.

With --data FILE.npz the volumes are a set of MedMNIST3D, and the defaults are its protocol (Yang et
al., arXiv:2110.14795): Adam, batches of 32, 100 epochs, a rate of 1e-3 that falls to a tenth after
half and three quarters of them; AUC and accuracy on the test set at the epoch of the best AUC on the
validation set.

    python examples/classification.py --target position --epochs 12 --output position
    python examples/classification.py --data organmnist3d.npz --network resnet18-28 --weights random
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import NamedTuple

import brains
import matplotlib
import numpy as np
import torch
from backbones import LITE0, classifier
from torch import Tensor
from torch.nn import functional as F
from training import InputError, Processes, Run, command, derive, one_line, parser, positive, smooth

import acs_triton
from acs_triton.demo.data import REGION, STRUCTURES
from acs_triton.demo.picture import STYLE

matplotlib.use("Agg")

from matplotlib import pyplot as plt

SPLITS = ("train", "val", "test")
SPACING = 2.0
"""Side of the brain blocks' voxels, mm."""
AXES = ("to the side", "to the front", "up")
"""What is regressed: distance from the middle plane (a block and its mirror image look alike), y and z."""
JUDGED = "fsl2006"
"""The template that is judged on: made from the same people as the others, but blurred less evenly."""


class Volumes(NamedTuple):
    """One split.

    Attributes:
        images: ``(N, 1, D, H, W)`` float32 in about [0, 1].
        targets: ``(N,)`` int64 classes, or ``(N, K)`` float32 numbers.
    """

    images: Tensor
    targets: Tensor


def brain_blocks(options: argparse.Namespace) -> dict[str, Volumes]:
    """Blocks around random voxels of random structures, of the templates to train on and of the judged one."""
    half = options.side // 2
    region = [(low - half * SPACING, high + half * SPACING) for low, high in REGION]
    splits = {}
    for number, (split, count) in enumerate({"train": options.blocks, "test": options.test_blocks}.items()):
        random = np.random.default_rng(derive(options.seed, number))
        names = [name for name in brains.NAMES if (name == JUDGED) == (split == "test")]
        images, targets = [], []
        for index, name in enumerate(names):
            brain = brains.load(name, SPACING, region)
            for _ in range(count // len(names) + (index < count % len(names))):
                structure = random.integers(1, 1 + len(STRUCTURES))
                centre = random.choice(np.argwhere(brain.labels == structure))
                images.append(brain.image[tuple(slice(c - half, c - half + options.side) for c in centre)])
                x, y, z = (brain.affine @ [*centre, 1])[:3]
                targets.append(structure - 1 if options.target == "structure" else (abs(x), y, z))
        kind = np.int64 if options.target == "structure" else np.float32
        splits[split] = Volumes(
            torch.from_numpy(np.stack(images))[:, None], torch.from_numpy(np.array(targets, dtype=kind))
        )
    return splits


def medmnist(path: Path) -> dict[str, Volumes]:
    """The splits of a MedMNIST3D file.

    Raises:
        InputError: it cannot be read, or is none.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, TypeError) as error:
        raise InputError(f"{path} cannot be read as an .npz file: {one_line(error)}") from error
    splits = {}
    for split in SPLITS:
        images, labels = (arrays.get(f"{split}_{what}") for what in ("images", "labels"))
        if images is None or labels is None:
            raise InputError(f"{path} holds no {split}_images or no {split}_labels")
        if images.ndim != 4 or labels.shape not in ((len(images), 1), (len(images),)):
            raise InputError(
                f"{path} has {split}_images of shape {images.shape} and {split}_labels of {labels.shape}; "
                "a set of MedMNIST3D has (N, D, H, W) and (N, 1)"
            )
        scaled = torch.from_numpy(images)[:, None].float() / 255
        splits[split] = Volumes(scaled, torch.from_numpy(labels.reshape(-1)).long())
    return splits


class Training(torch.utils.data.Dataset):
    """The training split, augmented: brain blocks mirrored left and right, shifted in brightness and contrast.

    MedMNIST's volumes stay as they are, except that ``shape_transform`` scales their intensities at
    random, as its experiments do with sets of shapes.
    """

    def __init__(self, volumes: Volumes, options: argparse.Namespace):
        self.volumes, self.brain, self.shape_transform = volumes, options.data is None, options.shape_transform

    def __len__(self) -> int:
        return len(self.volumes.images)

    def __getitem__(self, draw) -> tuple[Tensor, Tensor]:
        image, target = self.volumes.images[draw.index], self.volumes.targets[draw.index]
        random = np.random.default_rng(draw.seed)
        if self.brain:
            image = image.flip(1) if random.random() < 0.5 else image
            image = image.clamp(min=0) ** random.uniform(0.7, 1.4) * random.uniform(0.85, 1.15)
            image = image + random.uniform(0, 0.05) * torch.from_numpy(random.standard_normal(image.shape, np.float32))
        elif self.shape_transform:
            image = image * random.uniform()
        return image, target


def predict(run: Run, options: argparse.Namespace, volumes: Volumes) -> Tensor:
    """The network's outputs ``(N, K)`` for a split, on the CPU."""
    factor = 0.5 if options.shape_transform else 1.0

    def outputs(first: int) -> Tensor:
        batch = factor * volumes.images[first : first + options.batch]
        return run.model(batch.to(run.processes.device)).float().cpu()

    return torch.cat(run.evaluate(outputs, range(0, len(volumes.images), options.batch)))


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of each class against the rest, averaged over the classes that can be told apart.

    Args:
        scores: ``(N, classes)``, ties count half.
        labels: ``(N,)``.
    """
    areas = []
    for number, score in enumerate(scores.T):
        inside, outside = score[labels == number], np.sort(score[labels != number])
        if len(inside) and len(outside):
            below = np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")
            areas.append(below.mean() / 2 / len(outside))
    return float(np.mean(areas)) if areas else float("nan")


class Scale(NamedTuple):
    """Mean and standard deviation of the training targets; the network gives standardised numbers."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, targets: Tensor) -> Scale:
        return cls(targets.mean(0), targets.std(0))


def measure(outputs: Tensor, targets: Tensor, scale: Scale | None) -> dict[str, float | list[float]]:
    """AUC and accuracy of classes, or the mean absolute error of each number."""
    if scale is None:
        right = (outputs.argmax(1) == targets).double().mean().item()
        return {"auc": auc(outputs.softmax(1).double().numpy(), targets.numpy()), "accuracy": right}
    return {"error": (outputs * scale.std + scale.mean - targets).abs().mean(0).tolist()}


def best_epoch(history: dict[str, list]) -> int:
    """Index of the epoch to report: of the best validation AUC, or the last where there is no validation set."""
    return int(np.argmax(history["val_auc"])) if "val_auc" in history else -1


def report(history: dict[str, list], splits: dict[str, Volumes], scale: Scale | None) -> str:
    """The result as text."""
    chosen = best_epoch(history)
    if scale is None:
        lines = [
            f"{split}: AUC {history[f'{split}_auc'][chosen]:.3f}, accuracy {history[f'{split}_accuracy'][chosen]:.3f}"
            for split in splits
            if f"{split}_auc" in history
        ]
        epoch = len(history["test_auc"]) if chosen < 0 else 1 + chosen
        return f"epoch {epoch}: " + "; ".join(lines)
    blind = (splits["test"].targets - scale.mean).abs().mean(0).tolist()
    return "\n".join(
        f"test, {axis}: mean error {error:.1f} mm (always giving the mean of the training set: {other:.1f} mm)"
        for axis, error, other in zip(AXES, history["test_error"][chosen], blind, strict=True)
    )


def draw(options, run: Run, splits: dict[str, Volumes], scale: Scale | None, outputs: Tensor) -> None:
    """``classification.png``: loss, metric, what was predicted for the test set, and examples from it."""
    test, history = splits["test"], run.history
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(15, 8.5), dpi=100, layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(1.6, 1))
        curve, metric, last = upper.subplots(1, 3)
        steps = range(1, 1 + len(history["loss"]))
        curve.plot(steps, history["loss"], color="white", alpha=0.2, linewidth=1)
        curve.plot(steps, smooth(history["loss"]), color="white", linewidth=2)
        curve.set(xlabel="step", ylabel="training loss")
        if scale is None:
            for name in sorted(name for name in history if name.endswith(("auc", "accuracy"))):
                metric.plot(range(1, 1 + len(history[name])), history[name], label=name.replace("_", ", "))
            metric.set(xlabel="epoch", ylim=(None, 1.01))
            classes = outputs.shape[1]
            joint = torch.bincount(classes * test.targets + outputs.argmax(1), minlength=classes**2)
            joint = joint.reshape(classes, classes).numpy()
            last.imshow(joint / joint.sum(1, keepdims=True).clip(1), cmap="viridis", vmin=0, vmax=1)
            for row in range(classes):
                for column in range(classes):
                    last.text(column, row, joint[row, column], ha="center", va="center", color="white")
            names = list(STRUCTURES) if options.data is None else [str(number) for number in range(classes)]
            last.set_xticks(range(classes), names, rotation=45, ha="right")
            last.set_yticks(range(classes), names)
            last.set(xlabel="predicted, last epoch", ylabel="true")
            truth, found = [names[i] for i in test.targets], [names[i] for i in outputs.argmax(1)]
        else:
            numbers, true = (outputs * scale.std + scale.mean).numpy(), test.targets.numpy()
            for axis, errors in zip(AXES, np.array(history["test_error"]).T, strict=True):
                metric.plot(range(1, 1 + len(errors)), errors, label=axis)
            metric.set(xlabel="epoch", ylabel="mean error on the test set, mm", ylim=(0, None))
            for index, axis in enumerate(AXES):
                last.plot(true[:, index], numbers[:, index], ".", label=axis, alpha=0.7)
            ends = [true.min(), true.max()]
            last.plot(ends, ends, color="white", linewidth=1)
            last.set(xlabel="true, mm", ylabel="predicted, last epoch, mm")
            truth, found = (["({:.0f}, {:.0f}, {:.0f})".format(*row) for row in rows] for rows in (true, numbers))
            last.legend(frameon=False)
        metric.legend(frameon=False)
        shown = np.linspace(0, len(test.images) - 1, min(8, len(test.images))).astype(int)
        for panel, index in zip(np.atleast_1d(lower.subplots(1, len(shown))), shown, strict=True):
            volume = test.images[index, 0].numpy()
            panel.imshow(volume[:, volume.shape[1] // 2].T[::-1], cmap="gray")
            panel.set_title(f"{found[index]}\n{truth[index]}", fontsize=11)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        lower.suptitle("test volumes, middle slice: predicted above true", color="#8a919c", fontsize=11)
        figure.savefig(options.output / "classification.png")
        plt.close(figure)


@command
def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__.split("\n\n")[0], "classification")
    options.add_argument("--data", type=Path, help="a set of MedMNIST3D (.npz); without it, blocks of brain templates")
    options.add_argument("--target", default="structure", choices=("structure", "position"), help="of brain blocks")
    options.add_argument("--blocks", type=positive, default=400, help="brain blocks to train on")
    options.add_argument("--test-blocks", type=positive, default=200, help="brain blocks to judge on")
    options.add_argument("--side", type=positive, default=32, help=f"of brain blocks, in voxels of {SPACING:g} mm")
    options.add_argument("--shape-transform", action="store_true", help="MedMNIST's scaling, for sets of shapes")
    options.add_argument("--network", default=LITE0, help=f"{LITE0}, resnet18-28, resnet50-28, or a timm network")
    options.add_argument("--weights", default="imagenet", help="imagenet, random, or a file")
    options.add_argument("--kind", default="acs", choices=("acs", "soft", "mean", "2.5d", "3d"), help="of convolution")
    options.add_argument("--epochs", type=positive, default=100, help="passes over the training set")
    options.add_argument("--batch", type=positive, default=32, help="volumes a step and process")
    options.add_argument("--rate", type=float, default=1e-3, help="learning rate of Adam")
    options = options.parse_args(arguments)
    if options.data is not None and options.target == "position":
        raise InputError("--target position is for brain blocks; sets of MedMNIST3D have classes")

    processes = Processes(options.device)
    splits = brain_blocks(options) if options.data is None else medmnist(options.data)
    scale = Scale.of(splits["train"].targets) if options.target == "position" else None
    outputs = len(AXES) if scale else 1 + int(max(part.targets.max() for part in splits.values()))
    processes.say(", ".join(f"{split}: {len(part.images)} volumes" for split, part in splits.items()))

    torch.manual_seed(options.seed)
    model = acs_triton.convert(classifier(options.network, options.weights, outputs), options.kind, in_channels=1)
    model.to(processes.device)
    training = Training(splits["train"], options)
    run = Run(
        options.output / "checkpoint.pt",
        options,
        processes,
        model,
        torch.optim.Adam(model.parameters(), options.rate),
        items=len(training),
        epochs=options.epochs,
        batch=options.batch,
        rate=lambda done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),
    )
    for image, target in run.batches(training):
        with run.autocast():
            found = run.net(image)
            if scale is None:
                loss = F.cross_entropy(found, target)
            else:
                mean, std = (part.to(target.device) for part in scale)
                loss = F.smooth_l1_loss(found, (target - mean) / std)
        run.update(loss)
        if run.epoch_ended:
            for split in [name for name in splits if name != "train"]:
                values = measure(predict(run, options, splits[split]), splits[split].targets, scale)
                run.record(**{f"{split}_{name}": value for name, value in values.items()})
    found = predict(run, options, splits["test"])
    if processes.rank == 0:
        print(report(run.history, splits, scale))
        draw(options, run, splits, scale, found)
        print(f"picture: {options.output / 'classification.png'}")


if __name__ == "__main__":
    raise SystemExit(main())
