"""2D shapes to 3D shapes: what pretraining in 2D is worth in 3D, by kind of convolution.

The proof of concept of Yang et al. (arXiv:1911.10477, section 4). A 2D U-Net learns to tell squares
from circles in noise. Converted to 3D, it learns to tell cones, pyramids, cubes, cylinders and balls
in noise from few volumes, next to networks that start from random weights. Everything is generated;
each seed draws new data and new weights. Every training run has a checkpoint of its own: the same
command goes on where it was killed.

    python examples/shapes.py --output shapes
    torchrun --nproc-per-node 2 examples/shapes.py --output shapes
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import InputError, Processes, Run, command, derive, parser, positive, read_checkpoint

import acs_triton
from acs_triton.demo.picture import STYLE

matplotlib.use("Agg")

from matplotlib import pyplot as plt

PLANE_SHAPES = ("square", "circle")
SOLID_SHAPES = ("cone", "pyramid", "cube", "cylinder", "ball")
NOISE = 0.5
"""Standard deviation of the noise; shapes are 1, the background is 0."""
ARMS = {
    "acs:2d": "ACS, pretrained",
    "acs:random": "ACS, scratch",
    "3d:random": "Conv3d, scratch",
    "2.5d:2d": "2.5D, pretrained",
    "soft:2d": "Soft ACS, pretrained",
    "mean:2d": "Mean ACS, pretrained",
    "3d:2d": "Conv3d, inflated",
    "2.5d:random": "2.5D, scratch",
    "soft:random": "Soft ACS, scratch",
    "mean:random": "Mean ACS, scratch",
}
"""Kind of convolution, and the weights that it starts from: what may be compared, and its name."""
IMAGES, TRAIN, TEST = range(3)
"""Data sets; see :class:`Shapes`."""


def solid(shape: str, extent: int, height: int) -> np.ndarray:
    """A shape as booleans: ``(extent,) * 2`` in 2D, ``(extent, extent, height)`` in 3D.

    Cones and pyramids have their tip at the start of the last axis; cubes and balls are as high as wide.
    """
    across = np.arange(extent) - (extent - 1) / 2
    x, y = np.abs(across)[:, None], np.abs(across)[None, :]
    disc, square = np.hypot(x, y), np.maximum(x, y)
    if shape in PLANE_SHAPES:
        return disc <= extent / 2 if shape == "circle" else square <= extent / 2
    widening = np.linspace(0, extent / 2, height)
    full = {
        "cone": lambda: disc[..., None] <= widening,
        "pyramid": lambda: square[..., None] <= widening,
        "cube": lambda: np.ones((extent,) * 3, dtype=bool),
        "cylinder": lambda: np.repeat((disc <= extent / 2)[..., None], height, axis=2),
        "ball": lambda: np.hypot(disc[..., None], across) <= extent / 2,
    }
    return full[shape]()


class Shapes(torch.utils.data.Dataset):
    """Noisy shapes, each in a quadrant (or octant) of its own, and their labels; held in memory.

    As the authors' code makes them: three shapes in an image, four in a volume, between 5 voxels and
    half of the side large, at random places in their quadrants; here those in 3D stand on any axis.

    Args:
        dims: 2 or 3.
        count: number of images or volumes.
        side: their size along each axis.
        seed: of all that is random.

    An item is an image ``(1, side, ...)`` float32 and labels ``(side, ...)`` int64, 0 is background.
    """

    def __init__(self, dims: int, count: int, side: int, seed: int):
        names = PLANE_SHAPES if dims == 2 else SOLID_SHAPES
        random = np.random.default_rng(seed)
        labels = np.zeros((count, *(side,) * dims), dtype=np.int64)
        half = side // 2
        for label in labels:
            for corner in random.permutation(2**dims)[: dims + 1]:
                extent, height = random.integers(5, half + 1, size=2)
                kind = random.integers(len(names))
                shape = solid(names[kind], extent, height)
                if dims == 3:
                    shape = shape[..., :: random.choice([-1, 1])].transpose(random.permutation(3))
                start = [
                    half * (corner >> axis & 1) + random.integers(half - n + 1) for axis, n in enumerate(shape.shape)
                ]
                window = tuple(slice(first, first + n) for first, n in zip(start, shape.shape, strict=True))
                label[window][shape] = kind + 1
        noise = random.standard_normal(labels.shape, dtype=np.float32)
        self.labels = torch.from_numpy(labels)
        self.images = torch.from_numpy((labels > 0) + NOISE * noise).float().unsqueeze(1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, draw) -> tuple[Tensor, Tensor]:
        return self.images[draw.index], self.labels[draw.index]


class UNet(nn.Module):
    """A 2D U-Net of three levels: ``(N, 1, H, W)`` to ``(N, classes, H, W)``."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.down = nn.ModuleList(
            [block(1, width), block(width, 2 * width), block(2 * width, 4 * width)],
        )
        self.up = nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, layers in enumerate(self.down):
            x = layers(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for layers, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = layers(torch.cat([x, skip], 1))
        return self.head(x)


def block(channels: int, width: int) -> nn.Sequential:
    """Two convolutions with batch norm."""
    layers = []
    for first in (channels, width):
        layers += [nn.Conv2d(first, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


def network(kind: str, pretrained: dict | None, width: int, seed: int) -> nn.Module:
    """A U-Net for volumes, from 2D weights (all but the head) or from random ones.

    What starts from random weights starts from those that its kind gives: for ``"3d"`` dense
    kernels drawn as ``nn.Conv3d`` draws them, not inflated 2D ones.
    """
    torch.manual_seed(seed)
    model = UNet(1 + len(SOLID_SHAPES), width)
    if pretrained is not None:
        own = model.state_dict()
        model.load_state_dict({name: own[name] if name.startswith("head") else pretrained[name] for name in own})
    acs_triton.convert(model, kind)
    if pretrained is None and kind == "3d":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
    return model


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """One minus the soft Dice coefficient, averaged over all classes; the paper's loss."""
    axes = (0, *range(2, logits.dim()))
    probability = logits.float().softmax(1)
    target = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)
    overlap, total = (probability * target).sum(axes), (probability + target).sum(axes)
    return 1 - ((2 * overlap + 1e-2) / (total + 1e-2)).mean()


def cosine(done: float) -> float:
    """Factor of the learning rate, from 1 to 0."""
    return (1 + math.cos(math.pi * done)) / 2


def train(run: Run, data: Shapes, judged: Shapes | None = None, every: int = 1) -> None:
    """The rest of a run; the Dice of each shape in ``judged`` is recorded after every so many epochs and at the end."""
    for image, labels in run.batches(data):
        with run.autocast():
            loss = dice_loss(run.net(image), labels)
        run.update(loss)
        if judged is not None and run.epoch_ended and (run.epoch % every == 0 or run.step == run.order.steps):
            run.record(epoch=run.epoch, dice=dice(run, judged))


def dice(run: Run, data: Shapes) -> list[float]:
    """Dice coefficient of each shape over all voxels of a data set."""
    classes = 1 + len(SOLID_SHAPES)
    device, batch = run.processes.device, 10

    def counts(first: int) -> Tensor:
        part = slice(first, first + batch)
        found = run.model(data.images[part].to(device)).argmax(1).cpu()
        return torch.bincount((classes * data.labels[part] + found).flatten(), minlength=classes**2)

    joint = sum(run.evaluate(counts, range(0, len(data), batch))).reshape(classes, classes).double()
    return (2 * joint.diagonal() / (joint.sum(0) + joint.sum(1)))[1:].tolist()


def pretrain(options: argparse.Namespace, processes: Processes, seed: int) -> dict:
    """State dict of the 2D U-Net after its training on 2D shapes."""
    torch.manual_seed(derive(options.seed, seed))
    model = UNet(1 + len(PLANE_SHAPES), options.width).to(processes.device)
    run = Run(
        options.output / f"2d-{seed}.pt",
        options,
        processes,
        model,
        torch.optim.Adam(model.parameters(), options.rate),
        rate=cosine,
        items=options.images,
        epochs=options.epochs_2d,
        batch=options.batch_2d,
    )
    data = Shapes(2, options.images, options.side, derive(options.seed, seed, IMAGES))
    train(run, data)
    return model.state_dict()


def compare(options: argparse.Namespace, processes: Processes) -> dict[str, list[dict]]:
    """For each arm one history for each seed."""
    histories = {arm: [] for arm in options.arms}
    for seed in range(options.seeds):
        pretrained = None
        if any(arm.endswith(":2d") for arm in options.arms):
            pretrained = pretrain(options, processes, seed)
        data = Shapes(3, options.volumes, options.side, derive(options.seed, seed, TRAIN))
        judged = Shapes(3, options.test_volumes, options.side, derive(options.seed, seed, TEST))
        for arm in options.arms:
            kind, start = arm.split(":")
            model = network(kind, pretrained if start == "2d" else None, options.width, derive(options.seed, seed))
            model.to(processes.device)
            run = Run(
                checkpoint(options, arm, seed),
                options,
                processes,
                model,
                torch.optim.Adam(model.parameters(), options.rate),
                rate=cosine,
                items=options.volumes,
                epochs=options.epochs,
                batch=options.batch,
            )
            train(run, data, judged, options.judge_every)
            histories[arm].append(run.history)
    return histories


def checkpoint(options: argparse.Namespace, arm: str, seed: int) -> Path:
    return options.output / f"{arm.replace(':', '-')}-{seed}.pt"


def table(histories: dict[str, list[dict]], width: int) -> str:
    """Markdown: mean and standard deviation over the seeds of the Dice coefficients at the end, in percent."""
    lines = [
        "| network | parameters | " + " | ".join(SOLID_SHAPES) + " | mean |",
        "|---" * (3 + len(SOLID_SHAPES)) + "|",
    ]
    for arm, runs in histories.items():
        parameters = sum(p.numel() for p in network(arm.split(":")[0], None, width, 0).parameters())
        final = 100 * np.array([run["dice"][-1] for run in runs])
        cells = [f"{column.mean():.1f}" for column in final.T]
        means = final.mean(1)
        spread = f" ± {means.std(ddof=1):.1f}" if len(means) > 1 else ""
        lines.append(f"| {ARMS[arm]} | {parameters:,} | {' | '.join(cells)} | {means.mean():.1f}{spread} |")
    return "\n".join(lines)


def draw(options: argparse.Namespace, processes: Processes, histories: dict[str, list[dict]]) -> None:
    """``shapes.png``: learning curves with their spread, the end of each seed, and one volume's middle."""
    colours = plt.get_cmap("tab10").colors
    example = Shapes(3, 1, options.side, derive(options.seed, 0, TEST))
    middle = int(example.labels[0].ne(0).sum((1, 2)).argmax())
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(15, 9), dpi=100, layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(1.7, 1))
        curves, ends = upper.subplots(1, 2, width_ratios=(1.4, 1))
        for index, runs in enumerate(histories.values()):
            dices = np.array([np.mean(run["dice"], axis=1) for run in runs])
            epochs = runs[0]["epoch"]
            curves.plot(epochs, dices.mean(0), color=colours[index], linewidth=2)
            curves.fill_between(epochs, dices.min(0), dices.max(0), color=colours[index], alpha=0.15, linewidth=0)
            ends.plot(dices[:, -1], [index] * len(runs), "o", color=colours[index], markersize=7)
            ends.plot(dices[:, -1].mean(), index, "|", color="white", markersize=26, markeredgewidth=2)
        curves.set(xlabel="epoch", ylabel="mean Dice, test volumes", ylim=(0, None))
        curves.set_title(
            f"lines: mean over seeds ({options.seeds}), bands: lowest to highest", color="#8a919c", fontsize=11
        )
        ends.set_yticks(range(len(histories)), [ARMS[arm] for arm in histories], fontsize=13)
        for label, colour in zip(ends.get_yticklabels(), colours, strict=False):
            label.set_color(colour)
        ends.invert_yaxis()
        ends.grid(axis="x", alpha=0.15)
        ends.set(xlabel="mean Dice at the end")
        ends.set_title("dots: seeds, bar: mean", color="#8a919c", fontsize=11)
        panels = lower.subplots(1, 2 + len(histories))
        shown = {"volume": example.images[0, 0].numpy(), "labels": example.labels[0].numpy()}
        for arm in histories:
            kind = arm.split(":")[0]
            model = network(kind, None, options.width, 0)
            model.load_state_dict(read_checkpoint(checkpoint(options, arm, 0))["model"])
            with torch.no_grad():
                shown[ARMS[arm].replace(", ", ",\n")] = model.eval()(example.images)[0].argmax(0).numpy()
        for panel, (name, volume) in zip(panels, shown.items(), strict=True):
            if name == "volume":
                panel.imshow(volume[middle], cmap="gray")
            else:
                panel.imshow(volume[middle], cmap="Set2", vmin=1, vmax=8, alpha=(volume[middle] > 0).astype(float))
            panel.set_title(name, fontsize=11)
            panel.set(xticks=[], yticks=[])
        figure.savefig(options.output / "shapes.png")
        plt.close(figure)


def arm(text: str) -> str:
    if text not in ARMS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(ARMS)}, got {text!r}")
    return text


@command
def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__.split("\n\n")[0], "shapes")
    options.add_argument("--arms", type=arm, nargs="+", default=list(ARMS)[:6], help="KIND:START to compare")
    options.add_argument("--seeds", type=positive, default=3, help="repetitions, each with its own data and weights")
    options.add_argument("--side", type=positive, default=24, help="of images and volumes (paper: 48)")
    options.add_argument("--width", type=positive, default=8, help="channels of the first level (paper: 64)")
    options.add_argument("--images", type=positive, default=2000, help="2D images to pretrain on (paper: 10000)")
    options.add_argument("--epochs-2d", type=positive, default=6, help="of the pretraining (paper: 50)")
    options.add_argument("--batch-2d", type=positive, default=32, help="images a step and process (paper: 64)")
    options.add_argument("--volumes", type=positive, default=32, help="3D volumes to train on (paper: 100)")
    options.add_argument("--epochs", type=positive, default=20, help="of the 3D training (paper: 50)")
    options.add_argument("--batch", type=positive, default=4, help="volumes a step and process (paper: 4)")
    options.add_argument("--test-volumes", type=positive, default=40, help="3D volumes to judge on (paper: 200)")
    options.add_argument("--judge-every", type=positive, default=4, help="epochs between two points of the curves")
    options.add_argument("--rate", type=float, default=3e-3, help="Adam's learning rate, which falls to 0 as a cosine")
    options = options.parse_args(arguments)
    if options.side < 12:
        raise InputError(f"--side must be at least 12, for shapes of 5 voxels and more, got {options.side}")
    processes = Processes(options.device)
    histories = compare(options, processes)
    if processes.rank == 0:
        print(table(histories, options.width))
        draw(options, processes, histories)
        print(f"picture: {options.output / 'shapes.png'}")


if __name__ == "__main__":
    raise SystemExit(main())
