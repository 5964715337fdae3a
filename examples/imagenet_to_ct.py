"""From ImageNet to CT in 40 lines: a 2D network with its weights learns on one volume which way is up.

The first kernels are summed over RGB for one grey channel, the network is lifted, and trained on
crops that were turned by 0 to 3 quarters: a label that every volume brings along.

    python examples/imagenet_to_ct.py --volume ct.nii.gz --window -1000 400
"""

from pathlib import Path

import numpy as np
import torch
from backbones import LITE0, classifier
from brains import load, read
from matplotlib import pyplot as plt
from training import Draw, InputError, Processes, Run, command, parser, positive, smooth

import acs_triton


class Turned(torch.utils.data.Dataset):
    """Random cubes of a volume, and by how many quarters each was turned about its first axis."""

    def __init__(self, volume: np.ndarray, side: int):
        self.volume, self.side = volume, side

    def __getitem__(self, draw):
        random = np.random.default_rng(draw.seed)
        corner = [random.integers(size - self.side + 1) for size in self.volume.shape]
        cube = self.volume[tuple(slice(first, first + self.side) for first in corner)]
        turns = int(random.integers(4))
        return torch.from_numpy(np.rot90(cube, turns, (1, 2)).copy())[None], torch.tensor(turns)


def parse(arguments: list[str] | None):
    options = parser(__doc__.split("\n\n")[0], "imagenet_to_ct")
    options.add_argument("--volume", type=Path, help="a NIfTI file; without it, a brain template at 2 mm")
    options.add_argument("--window", type=float, nargs=2, default=(0, 1), help="of intensities, in HU for CT")
    options.add_argument("--network", default=LITE0, help=f"{LITE0}, or a timm network such as resnet18")
    options.add_argument("--weights", default="imagenet", help="imagenet, random, or a file")
    options.add_argument("--side", type=positive, default=32, help="of the cubes, in voxels")
    options.add_argument("--steps", type=positive, default=60, help="of training, 8 cubes each")
    return options.parse_args(arguments)


@command
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    low, high = options.window
    if low >= high:
        raise InputError(f"--window must be a low and a higher intensity, got {low:g} {high:g}")
    volume = read(options.volume)[0] if options.volume else load("sym2009a", spacing=2).image
    if min(volume.shape) < options.side:
        raise InputError(f"--side {options.side} is larger than the volume of {options.volume}, {volume.shape}")
    volume = 2 * ((volume - low) / (high - low)).clip(0, 1).astype(np.float32) - 1

    torch.manual_seed(options.seed)
    processes = Processes(options.device)
    network = classifier(options.network, options.weights, outputs=4)  # a 2D network for RGB images
    network = acs_triton.convert(network, "acs", in_channels=1).to(processes.device)  # the same, for grey volumes
    run = Run(
        options.output / "checkpoint.pt",
        options,
        processes,
        network,
        torch.optim.Adam(network.parameters(), lr=1e-3),
        items=8 * options.steps * processes.size,
        epochs=1,
        batch=8,
    )

    for cubes, turns in run.batches(Turned(volume, options.side)):
        with run.autocast():
            loss = torch.nn.functional.cross_entropy(run.net(cubes), turns)
        run.update(loss)

    if processes.rank == 0:
        cubes, turns = zip(*(Turned(volume, options.side)[Draw(i, i)] for i in range(4)), strict=True)
        with torch.no_grad():
            found = network.eval()(torch.stack(cubes).to(processes.device)).argmax(1).tolist()
        figure, (curve, panel) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(1, 2), layout="constrained")
        curve.plot(smooth(run.history["loss"], 10))
        curve.set(xlabel="step", ylabel=f"loss (guessing: {np.log(4):.2f})", ylim=(0, None))
        panel.imshow(np.concatenate([cube[0, options.side // 2] for cube in cubes], axis=1), cmap="gray")
        panel.set(xticks=[], yticks=[], title=f"turned by {[int(t) for t in turns]} quarters, found {found}")
        figure.savefig(options.output / "imagenet_to_ct.png")
        print(f"loss {run.history['loss'][0]:.2f}, at the end {smooth(run.history['loss'], 10)[-1]:.2f}")


if __name__ == "__main__":
    raise SystemExit(main())
