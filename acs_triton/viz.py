"""Pictures: how a 2D kernel becomes three oriented ones, and feature maps on three orthogonal planes.

Needs matplotlib: ``pip install 'acs-triton[viz]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .geometry import default_split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VIEWS = ("axial", "coronal", "sagittal")
PLANES = ("H, W", "D, W", "D, H")
"""The axes of the views' kernels (and of the planes that features are drawn on)."""
COLOURS = ("#2b83ba", "#e66101", "#1b9e77")


def views(
    what: Tensor | nn.Module | Sequence[Tensor],
    *,
    channels: int = 3,
    split: Sequence[int] | None = None,
    position: Sequence[float] = (0.5, 0.5, 0.5),
) -> Figure:
    """Draw 2D kernels in their three orientations, or feature maps on three orthogonal planes.

    Args:
        what: for kernels, a weight ``(O, C / groups, ku, kv)`` or a module that has one (``ACSConv``,
            ``nn.Conv2d``, lifted or not), drawn as the mean over its input channels; for features, maps
            ``(N, C, D, H, W)`` of which the first volume is drawn, or a list of such.
        channels: of kernels, how many of each view; of one map, how many (those that vary most); of a
            list only the one that varies most in each map.
        split: output channels ``(axial, coronal, sagittal)`` of kernels; the module's, or a third
            each by default.
        position: of features, where the planes lie along D, H and W, from 0 to 1.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: ``what`` is none of these, or an argument does not fit.
    """
    if not isinstance(channels, int) or channels < 1:
        raise ValueError(f"channels must be a positive int, got {channels!r}")
    if isinstance(what, nn.Module):
        weight = getattr(what, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 4:
            raise TypeError(f"a module to draw must have a weight (O, C / groups, ku, kv), got {type(what).__name__}")
        lift = getattr(what, "_acs_lift", None)
        split = split or getattr(what, "acs_kernel_split", None) or getattr(lift, "split", None)
        what = weight
    if isinstance(what, Tensor) and what.dim() == 4:
        return _draw_kernels(what.detach().float().cpu(), channels, split)
    maps = [what] if isinstance(what, Tensor) else list(what)
    if not maps or not all(isinstance(item, Tensor) and item.dim() == 5 for item in maps):
        raise TypeError(
            "what to draw must be a weight (O, C / groups, ku, kv), a module with one, or feature maps "
            f"(N, C, D, H, W), got {[tuple(item.shape) if isinstance(item, Tensor) else item for item in maps]}"
        )
    if len(position) != 3 or not all(0 <= place <= 1 for place in position):
        raise ValueError(f"position must be three numbers from 0 to 1, got {position!r}")
    columns = []
    for item in maps:
        volume = item[0].detach().float().cpu()
        kept = volume.flatten(1).var(1, correction=0).argsort(descending=True)[: channels if len(maps) == 1 else 1]
        columns += [(f"channel {index} of {len(volume)}", volume[index]) for index in kept.tolist()]
    return _draw_features(columns, position)


def _figure(width: float, height: float):
    """A figure of its own: no window, no global state of pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("views needs matplotlib: pip install 'acs-triton[viz]'") from error
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


# ---- kernels


def _draw_kernels(weight: Tensor, channels: int, split: Sequence[int] | None) -> Figure:
    split = default_split(len(weight)) if split is None else tuple(split)
    if len(split) != 3 or min(split) < 0 or sum(split) != len(weight):
        raise ValueError(f"split must be three sizes that sum to the {len(weight)} output channels, got {split!r}")
    kernels = weight.mean(1)
    rows = max(min(channels, max(split)), 1)
    figure = _figure(9, 0.7 + 1.55 * rows)
    grid = figure.add_gridspec(rows, 6, width_ratios=(1, 1.35) * 3)
    first = 0
    for view, count in enumerate(split):
        for row in range(min(rows, count)):
            channel = first + row
            kernel = kernels[channel]
            scale = kernel.abs().max().clamp_min(1e-12)
            colours = _diverging(kernel / scale)
            flat = figure.add_subplot(grid[row, 2 * view])
            flat.imshow(colours, interpolation="nearest")
            flat.set(xticks=[], yticks=[])
            flat.set_ylabel(f"channel {channel}", fontsize=8, color="#555555")
            for spine in flat.spines.values():
                spine.set(color=COLOURS[view], linewidth=1.5)
            solid = figure.add_subplot(grid[row, 2 * view + 1], projection="3d")
            _draw_oriented(solid, colours, view)
            if row == 0:
                title = f"{VIEWS[view]}: {PLANES[view]}\nchannels {first} to {first + count - 1}"
                solid.set_title(title, fontsize=9, color=COLOURS[view], loc="right", pad=2)
        first += count
    return figure


def _diverging(values: Tensor):
    """RGB ``(ku, kv, 3)`` of values from -1 (blue) over 0 (white) to 1 (red)."""
    ends = torch.tensor([[0.13, 0.40, 0.67], [0.70, 0.09, 0.17]])
    end = ends[(values > 0).long()]
    return (1 - values.abs().unsqueeze(-1) * (1 - end)).clamp(0, 1).numpy()


def _draw_oriented(axes, colours, view: int) -> None:
    """The kernel's tiles in the middle of the cube that a dense kernel would fill: D into the page, H down, W right."""
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    rows, columns = colours.shape[:2]
    size = max(rows, columns)
    plane = [axis for axis in range(3) if axis != view]

    def point(u, v):
        place = [size / 2] * 3
        place[plane[0]], place[plane[1]] = u, v
        depth, height, width = place
        return width, depth, -height

    tiles = [(u, v) for u in range(rows) for v in range(columns)]
    faces = [[point(u, v), point(u, v + 1), point(u + 1, v + 1), point(u + 1, v)] for u, v in tiles]
    axes.add_collection3d(
        Poly3DCollection(faces, facecolors=colours.reshape(-1, 3), edgecolors=COLOURS[view], linewidths=0.6)
    )
    ends = (0, size)
    for one in ends:
        for other in ends:
            for edge in (
                (ends, (one, one), (-other, -other)),
                ((one, one), ends, (-other, -other)),
                ((one, one), (other, other), (0, -size)),
            ):
                axes.plot(*edge, color="#bbbbbb", linewidth=0.6)
    grey = {"fontsize": 7, "color": "#777777", "ha": "center", "va": "center"}
    axes.text(size / 2, -0.1 * size, -1.1 * size, "W", **grey)
    axes.text(1.12 * size, size / 2, -1.1 * size, "D", **grey)
    axes.text(-0.12 * size, -0.05 * size, -size / 2, "H", **grey)
    axes.set(xlim=ends, ylim=ends, zlim=(-size, 0))
    axes.set_box_aspect((1, 1, 1), zoom=0.98)
    axes.view_init(elev=22, azim=-58)
    axes.set_axis_off()


# ---- features


def _draw_features(columns: list[tuple[str, Tensor]], position: Sequence[float]) -> Figure:
    heights = []
    for axis in range(3):
        planes = [volume.select(axis, 0) for _, volume in columns]
        heights.append(max(plane.shape[0] / plane.shape[1] for plane in planes))
    width = 1.9
    figure = _figure(0.35 + width * len(columns), 0.45 + width * sum(heights))
    panels = figure.subplots(3, len(columns), squeeze=False, height_ratios=heights)
    for column, (title, volume) in enumerate(columns):
        low, high = volume.min().item(), volume.max().item()
        panels[0][column].set_title(f"{title}\n{' × '.join(map(str, volume.shape))}", fontsize=8)
        for axis, panel in enumerate(panels[:, column]):
            size = volume.shape[axis]
            plane = volume.select(axis, min(int(position[axis] * size), size - 1))
            panel.imshow(plane.numpy(), cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            for spine in panel.spines.values():
                spine.set(color=COLOURS[axis], linewidth=1.5)
            if column == 0:
                panel.set_ylabel(f"{VIEWS[axis]} ({PLANES[axis]})", fontsize=9, color=COLOURS[axis])
    return figure
