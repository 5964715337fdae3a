"""The picture: T1, labels and predictions on three planes, the loss curves, Dice per structure."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from .data import STRUCTURES, Brain

COLOURS = ("#4cc9f0", "#ff4d8d", "#ffd166", "#06d6a0", "#b388ff", "#ff8c42")
BACKGROUND, FOREGROUND, FAINT = "#101318", "#e8eaed", "#8a919c"
STYLE = {
    "figure.facecolor": BACKGROUND,
    "axes.facecolor": BACKGROUND,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": FOREGROUND,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": FOREGROUND,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "font.size": 11,
}


class Outcome(NamedTuple):
    """What one training run gave.

    Attributes:
        name: of the start, e.g. "ImageNet weights".
        losses: one a step.
        prediction: ``(D, H, W)`` int64, 0 outside the held-out slabs.
        dice: one number a structure, over all held-out slabs.
    """

    name: str
    losses: list[float]
    prediction: np.ndarray
    dice: list[float]


def _plane(volume: np.ndarray, axis: int, position: int) -> np.ndarray:
    """A slice as it is drawn: superior (or anterior, in the axial plane) upwards."""
    plane = volume.take(position, axis=axis)
    return (plane, plane[::-1], plane.T)[axis]


def _fullest(labels: np.ndarray, axis: int) -> int:
    """The position along an axis that shows the most structures well."""
    others = tuple(other for other in range(3) if other != axis)
    voxels = np.stack([(labels == number).sum(others) for number in range(1, 1 + len(STRUCTURES))])
    return int(np.log1p(voxels).sum(0).argmax())


def _smooth(values: list[float], width: int) -> np.ndarray:
    """Running mean over the last ``width`` values (fewer at the start)."""
    total = np.cumsum([0.0, *values])
    last = np.arange(1, len(total))
    first = np.maximum(last - width, 0)
    return (total[last] - total[first]) / (last - first)


def draw(path: Path, brain: Brain, held_out: list[range], outcomes: list[Outcome]) -> None:
    """Write the picture as a PNG."""
    image, labels = brain.image.numpy(), brain.labels.numpy()
    judged = np.zeros(image.shape, dtype=bool)
    for slab in held_out:
        judged[slab.start : slab.stop] = True
    volumes = {
        "T1 (MNI152)": None,
        "labels": labels,
        **{f"prediction, from {outcome.name}": outcome.prediction for outcome in outcomes},
    }
    positions = [_fullest(np.where(judged, labels, 0), axis) for axis in range(3)]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(4 * len(volumes), 15.5), dpi=110, layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(3.1, 1), hspace=0.03)
        panels = upper.subplots(3, len(volumes), height_ratios=[1.0, 1.1, 0.98])
        for row, (name, position) in enumerate(zip(("coronal", "axial", "sagittal"), positions, strict=True)):
            for panel, (title, shown) in zip(panels[row], volumes.items(), strict=True):
                _draw_plane(panel, image, shown, labels, judged, row, position)
                if row == 0:
                    panel.set_title(title, fontsize=15, pad=10)
            panels[row][0].set_ylabel(name, fontsize=15)
        upper.suptitle(
            "Predictions are drawn where they are judged: in the slabs that training never saw (bright). "
            "White lines are the labels' outlines.",
            color=FAINT,
        )
        upper.legend(
            handles=[Patch(color=c, label=s) for c, s in zip(COLOURS, STRUCTURES, strict=True)],
            loc="outside lower center",
            ncols=len(STRUCTURES),
            frameon=False,
            fontsize=13,
        )
        curves, bars = lower.subplots(1, 2)
        _draw_losses(curves, outcomes)
        _draw_dice(bars, outcomes)
        figure.savefig(path)
        plt.close(figure)


def _draw_plane(panel, image, shown, labels, judged, axis: int, position: int) -> None:
    grey = _plane(image, axis, position)
    if shown is not None:
        bright = _plane(judged, axis, position)
        grey = np.where(bright, grey, 0.45 * grey)
    panel.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
    if shown is not None:
        overlay = _plane(shown, axis, position)
        panel.imshow(
            np.ma.masked_equal(overlay, 0),
            cmap=ListedColormap(COLOURS),
            vmin=1,
            vmax=len(COLOURS),
            alpha=np.where(bright, 0.75, 0.3),
            interpolation="nearest",
        )
    if shown is not None and shown is not labels:
        truth = np.where(bright, _plane(labels, axis, position), 0)
        for number in np.unique(truth[truth > 0]):
            panel.contour(truth == number, levels=[0.5], colors="white", linewidths=0.9)
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)


def _draw_losses(axes, outcomes: list[Outcome]) -> None:
    for outcome, colour in zip(outcomes, ("#ffffff", "#7d8590"), strict=True):
        steps = np.arange(1, len(outcome.losses) + 1)
        axes.plot(steps, outcome.losses, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(outcome.losses, 10), color=colour, linewidth=2.5, label=f"from {outcome.name}")
    axes.set(xlabel="step", ylabel="training loss", ylim=(0, None), xlim=(1, None))
    axes.legend(frameon=False)


def _draw_dice(axes, outcomes: list[Outcome]) -> None:
    width = 0.8 / len(outcomes)
    for index, (outcome, alpha) in enumerate(zip(outcomes, (1.0, 0.4), strict=True)):
        places = np.arange(len(STRUCTURES)) + (index - (len(outcomes) - 1) / 2) * width
        bars = axes.bar(places, outcome.dice, width=0.92 * width, color=COLOURS, alpha=alpha)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=9, color=FOREGROUND if alpha == 1 else FAINT)
    axes.set(ylim=(0, 1.05), ylabel="Dice, held-out slabs")
    axes.set_xticks(range(len(STRUCTURES)), STRUCTURES)
    axes.set_title("full: from {}, pale: from {}".format(*(outcome.name for outcome in outcomes)), color=FAINT)
