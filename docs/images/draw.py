"""``python docs/images/draw.py``: draw the pictures of this folder again (needs the extra ``demo``)."""

from pathlib import Path

import torch

import acs_triton
from acs_triton.demo.data import load_brain
from acs_triton.demo.network import FeaturePyramid, classifier
from acs_triton.viz import views

HERE = Path(__file__).parent


def main() -> None:
    encoder = acs_triton.convert(FeaturePyramid(classifier(pretrained=True))).eval()
    views(encoder.stem[0]).savefig(HERE / "kernels.png")
    image = load_brain().image
    # D is y, H is z and W is x there; with D = z and H = y the axial plane is (H, W), as in a CT series.
    volume = image.permute(1, 0, 2).flip(1)[None, None]
    with torch.no_grad():
        maps = encoder(2 * volume.expand(-1, 3, -1, -1, -1) - 1)
    views([volume, *maps[:3]], position=(0.5, 0.45, 0.45)).savefig(HERE / "features.png")


if __name__ == "__main__":
    main()
