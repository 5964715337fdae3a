"""Segmentation of volumes: a 2D ImageNet network as the encoder of a 3D U-Net, trained on NIfTI files.

The folder --data holds images/NAME.nii.gz and labels/NAME.nii.gz (or .nii), labels 0, 1, 2, ... with
0 the background. Random crops are drawn with MONAI's transforms; held-out cases are judged whole, by
MONAI's sliding-window inference, and their predictions are written as NIfTI files. Three volumes to
try it on are written by examples/brains.py.

    python examples/segmentation.py --data FOLDER --holdout 'fsl*' --output run
    torchrun --nproc-per-node 2 examples/segmentation.py --data FOLDER --amp bfloat16 --output run
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
from pathlib import Path
from typing import NamedTuple

import matplotlib
import nibabel
import numpy as np
import torch
from backbones import LITE0, encoder
from brains import read
from monai import transforms
from monai.inferers import sliding_window_inference
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import Tensor
from training import InputError, Processes, Run, command, derive, one_line, parser, positive, smooth

from acs_triton.demo.picture import COLOURS, STYLE
from acs_triton.models import LiftedUNet

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap

KEYS = ("image", "label")
SPLIT = 3
"""What a number is drawn for, besides those of :mod:`training`."""
ENCODER_RATE = 0.3
"""The encoder's learning rate, relative to the decoder's, whose weights are new."""


class Case(NamedTuple):
    name: str
    image: Path
    label: Path


def find_cases(folder: Path) -> list[Case]:
    """The cases of a folder, by the names of the files in ``images`` and in ``labels``.

    Raises:
        InputError: a folder is missing or has no NIfTI files.
    """
    files = []
    for kind in ("images", "labels"):
        if not (folder / kind).is_dir():
            raise InputError(f"{folder / kind} is not a folder; --data must hold images/ and labels/")
        paths = sorted(path for path in (folder / kind).iterdir() if path.name.endswith((".nii", ".nii.gz")))
        if not paths:
            raise InputError(f"{folder / kind} holds no .nii or .nii.gz files")
        files.append({path.name.removesuffix(".gz").removesuffix(".nii"): path for path in paths})
    images, labels = files
    return [
        Case(
            name,
            images.get(name, folder / "images" / f"{name}.nii.gz"),
            labels.get(name, folder / "labels" / f"{name}.nii.gz"),
        )
        for name in sorted(images.keys() | labels.keys())
    ]


def check(case: Case) -> tuple[str | None, int]:
    """What is wrong with a case, as a sentence (None: nothing), and its largest label. Reads both files."""
    for path, other in ((case.image, case.label), (case.label, case.image)):
        if not path.exists():
            return f"{path} does not exist, but {other} does", 0
    try:
        (image, affine), (label, label_affine) = read(case.image), read(case.label)
    except InputError as error:
        return str(error), 0
    if image.shape != label.shape:
        return f"{case.label} has size {label.shape}, but {case.image} has {image.shape}", 0
    if not np.allclose(affine, label_affine, atol=1e-2):
        return f"{case.label} lies elsewhere in space than {case.image}: their affines differ", 0
    if label.min() < 0 or (label != np.round(label)).any():
        return f"{case.label} holds {label.min()} to {label.max()}, not whole numbers from 0 up", 0
    return None, int(label.max())


def usable_cases(options: argparse.Namespace, processes: Processes) -> tuple[list[Case], int]:
    """The cases that :func:`check` finds nothing wrong with, and the number of classes.

    Raises:
        InputError: there are none; or something is wrong with one, and ``skip_broken`` is not set.
    """
    cases = find_cases(options.data)
    found = processes.map(check, cases, "checking files")
    problems = [problem for problem, _ in found if problem]
    if problems:
        if not options.skip_broken:
            more = f" (and {len(problems) - 1} more such cases)" if len(problems) > 1 else ""
            raise InputError(f"{problems[0]}{more}; --skip-broken leaves such cases out")
        processes.say(f"skipped {len(problems)} of {len(cases)} cases:\n  " + "\n  ".join(problems))
    good = [case for case, (problem, _) in zip(cases, found, strict=True) if not problem]
    classes = 1 + max((largest for problem, largest in found if not problem), default=0)
    if classes < 2:
        raise InputError(f"{options.data} has no usable case with a label above 0")
    return good, classes


def split(cases: list[Case], options: argparse.Namespace) -> tuple[list[Case], list[Case]]:
    """Training and held-out cases."""
    try:
        share = float(options.holdout)
    except ValueError:
        held_out = [case for case in cases if fnmatch.fnmatch(case.name, options.holdout)]
    else:
        count = max(1, round(share * len(cases)))
        held_out = [
            cases[i] for i in np.random.default_rng(derive(options.seed, SPLIT)).permutation(len(cases))[:count]
        ]
    training = [case for case in cases if case not in held_out]
    if not training or not held_out:
        raise InputError(
            f"--holdout {options.holdout} leaves {len(training)} cases of {options.data} to train on and "
            f"{len(held_out)} to judge on; both must have one"
        )
    return training, sorted(held_out)


def preparation(options: argparse.Namespace) -> transforms.Compose:
    """From files to tensors ``(1, D, H, W)`` in [-1, 1]; D points upwards, H to the back, W to the left."""
    steps = [
        transforms.LoadImaged(KEYS, image_only=True),
        transforms.EnsureChannelFirstd(KEYS, channel_dim="no_channel"),
        transforms.Orientationd(KEYS, axcodes="SPL", labels=None),
    ]
    if options.spacing:
        steps.append(transforms.Spacingd(KEYS, pixdim=options.spacing, mode=("bilinear", "nearest")))
    if options.window:
        steps.append(transforms.ScaleIntensityRanged("image", *options.window, -1.0, 1.0, clip=True))
    else:
        steps.append(transforms.ScaleIntensityRangePercentilesd("image", 0.5, 99.5, -1.0, 1.0, clip=True))
    return transforms.Compose(steps)


def augmentation(options: argparse.Namespace, classes: int) -> transforms.Compose:
    """Random crops, with all classes in their middles equally often, turned, scaled and changed in contrast."""
    return transforms.Compose(
        [
            transforms.SpatialPadd(KEYS, options.patch),
            transforms.RandCropByLabelClassesd(KEYS, "label", options.patch, num_classes=classes, warn=False),
            transforms.RandAffined(
                KEYS,
                prob=0.5,
                rotate_range=(0.2, 0.2, 0.2),
                scale_range=(0.1, 0.1, 0.1),
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            transforms.RandFlipd(KEYS, prob=0.5 if options.flip else 0.0, spatial_axis=2),
            transforms.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
            transforms.RandGaussianNoised("image", prob=0.3, std=0.1),
        ]
    )


class Crops(torch.utils.data.Dataset):
    """``crops`` items for each case: image and labels ``(1, *patch)``, float32 as MONAI's losses take them."""

    def __init__(self, cases: list[Case], options: argparse.Namespace, classes: int):
        self.cases, self.crops = cases, options.crops
        self.prepare, self.augment = preparation(options), augmentation(options, classes)
        self.prepared = functools.lru_cache(options.cache)(self._prepared)

    def __len__(self) -> int:
        return self.crops * len(self.cases)

    def _prepared(self, index: int) -> dict:
        return self.prepare({key: getattr(self.cases[index], key) for key in KEYS})

    def __getitem__(self, draw) -> tuple[Tensor, Tensor]:
        self.augment.set_random_state(draw.seed)
        crop = self.augment(self.prepared(draw.index // self.crops))[0]
        return crop["image"].as_tensor().float(), crop["label"].as_tensor().float()


def predict(run: Run, options: argparse.Namespace, image: Tensor) -> Tensor:
    """Labels ``(D, H, W)`` of a prepared image ``(1, D, H, W)``, on the CPU."""
    logits = sliding_window_inference(
        image[None].to(run.processes.device), options.patch, options.batch, run.model, overlap=0.5, mode="gaussian"
    )
    return logits[0].argmax(0).cpu()


def dice(found: Tensor, label: Tensor, classes: int) -> list[float]:
    """Dice coefficient of each class but the background; NaN where neither has a voxel of it."""
    joint = torch.bincount((classes * label + found).flatten(), minlength=classes**2).reshape(classes, classes).double()
    return (2 * joint.diagonal() / (joint.sum(0) + joint.sum(1)))[1:].tolist()


def judge(run: Run, options: argparse.Namespace, classes: int, case: Case) -> list[float]:
    """Dice of a held-out case; writes its prediction, on the prepared grid, to ``output/predictions``."""
    volume = preparation(options)({key: getattr(case, key) for key in KEYS})
    found = predict(run, options, volume["image"].as_tensor())
    path = options.output / "predictions" / f"{case.name}.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(found.numpy().astype(np.uint8), volume["image"].affine.numpy()), path)
    return dice(found, volume["label"].as_tensor()[0].long(), classes)


def draw(options: argparse.Namespace, run: Run, case: Case, classes: int) -> None:
    """``segmentation.png``: a held-out case on three planes, loss, and Dice of each class."""
    volume = preparation(options)({key: getattr(case, key) for key in KEYS})
    image, label = (volume[key][0].numpy() for key in KEYS)
    found = np.asanyarray(nibabel.load(options.output / "predictions" / f"{case.name}.nii.gz").dataobj)
    colours = ListedColormap(COLOURS[: classes - 1]) if classes <= 1 + len(COLOURS) else plt.get_cmap("hsv", classes)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13, 11), dpi=100, layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(2.2, 1))
        panels = upper.subplots(3, 3)
        for axis, row in enumerate(panels.T):
            others = tuple(other for other in range(3) if other != axis)
            fullest = sum(np.log1p((label == number).sum(others)) for number in range(1, classes)).argmax()
            for panel, shown in zip(row, (None, label, found), strict=True):
                planes = [
                    part.take(fullest, axis) if axis == 0 else part.take(fullest, axis)[::-1]
                    for part in (image, label if shown is None else shown)
                ]
                panel.imshow(planes[0], cmap="gray", interpolation="bilinear")
                if shown is not None:
                    masked = np.ma.masked_equal(planes[1], 0)
                    panel.imshow(masked, cmap=colours, vmin=0.5, vmax=classes - 0.5, alpha=0.7, interpolation="nearest")
                panel.set(xticks=[], yticks=[])
                panel.spines[:].set_visible(False)
            row[0].set_title(("axial", "coronal", "sagittal")[axis])
        for panel, name in zip(panels[:, 0], (case.name, "labels", "prediction"), strict=True):
            panel.set_ylabel(name, fontsize=13)
        curve, bars = lower.subplots(1, 2)
        losses = run.history["loss"]
        curve.plot(range(1, 1 + len(losses)), losses, color="white", alpha=0.2, linewidth=1)
        curve.plot(range(1, 1 + len(losses)), smooth(losses), color="white", linewidth=2)
        curve.set(xlabel="step", ylabel="training loss")
        ends = np.array(run.history["dice"][-1], dtype=float)
        means = [column[~np.isnan(column)].mean() if (~np.isnan(column)).any() else 0 for column in ends.T]
        drawn = bars.bar(range(1, classes), means, color=[colours(i) for i in range(classes - 1)])
        bars.bar_label(drawn, fmt="%.2f", color=STYLE["text.color"])
        bars.set(xlabel="class", ylabel=f"Dice, mean of {len(ends)} held-out cases", ylim=(0, 1.05))
        bars.set_xticks(range(1, classes))
        figure.savefig(options.output / "segmentation.png")
        plt.close(figure)


@command
def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__.split("\n\n")[0], "segmentation")
    options.add_argument("--data", type=Path, required=True, help="folder that holds images/ and labels/")
    options.add_argument(
        "--skip-broken", action="store_true", help="leave out cases with something wrong, and say which"
    )
    options.add_argument("--holdout", default="0.2", help="cases to judge on: a share, or a pattern of names")
    options.add_argument("--encoder", default=LITE0, help=f"{LITE0}, or a timm network")
    options.add_argument("--weights", default="imagenet", help="of the encoder: imagenet, random, or a file")
    options.add_argument("--kind", default="acs", choices=("acs", "soft", "mean", "2.5d", "3d"), help="of convolution")
    options.add_argument("--norm", default="batch", choices=("batch", "instance"), help="in the decoder")
    options.add_argument("--deep-supervision", type=int, default=0, help="smaller outputs that are trained too")
    options.add_argument(
        "--spacing", type=float, nargs=3, metavar=("D", "H", "W"), help="resample to voxels of this size, mm"
    )
    options.add_argument(
        "--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of intensities, e.g. -160 240 for CT"
    )
    options.add_argument(
        "--patch", type=positive, nargs=3, default=(32, 64, 64), metavar=("D", "H", "W"), help="size of crops"
    )
    options.add_argument("--flip", action="store_true", help="mirror left and right at random")
    options.add_argument("--epochs", type=positive, default=100, help="passes over the cases")
    options.add_argument("--crops", type=positive, default=4, help="of each case in an epoch")
    options.add_argument("--batch", type=positive, default=2, help="crops a step and process")
    options.add_argument("--rate", type=float, default=3e-3, help="learning rate of AdamW")
    options.add_argument(
        "--judge-every", type=positive, default=25, help="epochs between judgements of the held-out cases"
    )
    options.add_argument("--cache", type=positive, default=32, help="cases kept in memory, for each loading process")
    options = options.parse_args(arguments)

    if options.window and options.window[0] >= options.window[1]:
        raise InputError(f"--window must be a low and a higher intensity, got {options.window}")
    processes = Processes(options.device)
    cases, classes = usable_cases(options, processes)
    training, held_out = split(cases, options)
    processes.say(f"{len(training)} cases to train on, {len(held_out)} held out, {classes} classes")

    torch.manual_seed(options.seed)
    try:
        model = LiftedUNet(
            encoder(options.encoder, options.weights),
            in_channels=1,
            classes=classes,
            kind=options.kind,
            norm=options.norm,
            deep_supervision=options.deep_supervision,
            spacing=options.spacing,
        ).to(processes.device)
    except ValueError as error:
        raise InputError(one_line(error)) from error
    fresh = [weight for name, weight in model.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": model.encoder.parameters(), "lr": ENCODER_RATE * options.rate}, {"params": fresh}]
    crops = Crops(training, options, classes)
    run = Run(
        options.output / "checkpoint.pt",
        options,
        processes,
        model,
        torch.optim.AdamW(groups, options.rate),
        items=len(crops),
        epochs=options.epochs,
        batch=options.batch,
        rate=lambda done: (1 - done) ** 0.9,
    )
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)
    if options.deep_supervision:
        loss_of = DeepSupervisionLoss(loss_of)
    for image, label in run.batches(crops):
        with run.autocast():
            loss = loss_of(run.net(image), label)
        run.update(loss)
        if run.epoch_ended and (run.epoch % options.judge_every == 0 or run.step == run.order.steps):
            found = run.evaluate(functools.partial(judge, run, options, classes), held_out, "held-out cases")
            run.record(epoch=run.epoch, dice=found)
            processes.say(f"epoch {run.epoch}: mean Dice of the held-out cases {np.nanmean(found):.3f}")
    if processes.rank == 0:
        draw(options, run, held_out[0], classes)
        for case, values in zip(held_out, run.history["dice"][-1], strict=True):
            print(f"{case.name}: Dice " + " ".join(f"{value:.3f}" for value in values))
        print(f"predictions: {options.output / 'predictions'}, picture: {options.output / 'segmentation.png'}")


if __name__ == "__main__":
    raise SystemExit(main())
