"""The pictures show the numbers that they are given, in the places that the axes say."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from acs_triton import convert
from acs_triton.operators import ACSConv
from acs_triton.viz import views

pytest.importorskip("matplotlib")


def panels(figure, solid):
    return [axes for axes in figure.axes if (axes.name == "3d") == solid]


def tiles(axes):
    """Centres ``(D, H, W)`` and colours of the tiles of an oriented kernel."""
    axes.figure.canvas.draw()
    tiles = axes.collections[0]
    corners = np.asarray(tiles._faces if hasattr(tiles, "_faces") else tiles._vec[:3].T.reshape(-1, 4, 3))
    width, depth, height = np.moveaxis(corners.mean(1), 1, 0)
    return np.stack([depth, -height, width], 1)


@pytest.mark.parametrize("size", [(3, 3), (1, 5)])
def test_each_view_lies_in_its_plane(size):
    weight = torch.randn(7, 2, *size)
    figure = views(weight, channels=2)
    flat, solid = panels(figure, False), panels(figure, True)
    assert [axes.get_ylabel() for axes in flat] == [f"channel {number}" for number in (0, 1, 3, 4, 5, 6)]
    for axes, channel in zip(flat, (0, 1, 3, 4, 5, 6), strict=True):
        kernel = weight[channel].mean(0)
        image = axes.images[0].get_array()
        red = image[..., 0] - image[..., 2]
        assert np.array_equal(np.sign(red.round(6)), np.sign(kernel.numpy()))
    for number, axes in enumerate(solid):
        view, centres = number // 2, tiles(axes)
        assert len(centres) == size[0] * size[1]
        assert np.ptp(centres[:, view]) == 0  # flat across its own axis
        others = [axis for axis in range(3) if axis != view]
        assert len(np.unique(centres[:, others[0]].round(5))) == size[0]
        assert len(np.unique(centres[:, others[1]].round(5))) == size[1]


def test_modules_and_splits():
    layer = ACSConv(2, 6, 3, acs_kernel_split=(0, 5, 1))
    assert len(panels(views(layer, channels=3), True)) == 4
    lifted = convert(nn.Sequential(nn.Conv2d(2, 6, 3)), rules={"0": {"split": (6, 0, 0)}})
    assert len(panels(views(lifted[0], channels=3), True)) == 3
    assert len(panels(views(nn.Conv2d(2, 6, 3), channels=3), True)) == 6


def test_features_on_three_planes():
    volume = torch.arange(2 * 4 * 5 * 6.0).view(1, 2, 4, 5, 6)
    volume[:, 1] *= 2  # varies most
    figure = views(volume, channels=2, position=(0.5, 0, 1))
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert [title.split("\n")[0] for title in titles] == ["channel 1 of 2", "channel 0 of 2"]
    shown = [axes.images[0].get_array() for axes in figure.axes]
    for column, channel in enumerate((1, 0)):
        map = volume[0, channel].numpy()
        for row, plane in enumerate((map[2], map[:, 0], map[:, :, 5])):
            assert np.array_equal(shown[2 * row + column], plane)


def test_lists_of_maps_are_columns():
    maps = [torch.rand(2, 3, 8, 8, 8), torch.rand(2, 5, 4, 4, 4)]
    maps[1][:, 4] *= 3
    figure = views(maps)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles[1] == "channel 4 of 5\n4 × 4 × 4"
    assert len(figure.axes) == 6


def test_files(tmp_path):
    for name, what in (("kernels.png", torch.randn(3, 1, 3, 3)), ("features.png", torch.rand(1, 1, 4, 4, 4))):
        views(what).savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000


@pytest.mark.parametrize(
    ("what", "options", "error", "message"),
    [
        (torch.rand(3, 3, 3), {}, TypeError, r"feature maps \(N, C, D, H, W\), got \[\(3, 3, 3\)\]"),
        ([], {}, TypeError, r"got \[\]"),
        (nn.ReLU(), {}, TypeError, r"a module to draw must have a weight .*, got ReLU"),
        (torch.rand(4, 1, 3, 3), {"split": (1, 1, 1)}, ValueError, r"sum to the 4 output channels, got \(1, 1, 1\)"),
        (torch.rand(4, 1, 3, 3), {"channels": 0}, ValueError, r"channels must be a positive int, got 0"),
        (torch.rand(1, 1, 3, 3, 3), {"position": (0, 0, 2)}, ValueError, r"three numbers from 0 to 1, got \(0, 0, 2\)"),
    ],
)
def test_bad_arguments(what, options, error, message):
    with pytest.raises(error, match=message):
        views(what, **options)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'acs-triton\[viz\]'"):
        views(torch.rand(3, 1, 3, 3))
    code = "import acs_triton.viz, sys; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
