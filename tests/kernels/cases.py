"""Convolutions that the matrix kernels are tested with."""

from dataclasses import dataclass

import torch
from hypothesis import assume
from hypothesis import strategies as st

from acs_triton.geometry import ConvParams, Geometry, default_split

LAYOUTS = {"ncdhw": torch.contiguous_format, "channels_last": torch.channels_last_3d}


@dataclass(frozen=True)
class Case:
    """A convolution by its arguments; ``padding`` may differ on the low and high side of all axes.

    With the ``split`` ``()`` the views are mixed.
    """

    in_channels: int
    out_channels: int
    size: tuple
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1, 1)
    padding: tuple = (1, 1)
    dilation: int = 1
    groups: int = 1
    split: tuple | None = None
    rule: str = "acsconv"
    batch: int = 2
    layout: str = "channels_last"

    @property
    def geometry(self) -> Geometry:
        low, high = self.padding
        return ConvParams(
            kernel_size=self.kernel,
            stride=self.stride,
            padding_low=(low,) * 4,
            padding_high=(high,) * 4,
            dilation=(self.dilation,) * 4,
            groups=self.groups,
            split=default_split(self.out_channels) if self.split is None else self.split,
            rule=self.rule,
        ).geometry(self.size)

    @property
    def input_shape(self):
        return (self.batch, self.in_channels, *self.size)

    @property
    def weight_shape(self):
        views = (3,) if self.split == () else ()
        return (self.out_channels, self.in_channels // self.groups, *views, *self.kernel)

    @property
    def output_shape(self):
        return (self.batch, self.out_channels, *self.geometry.output_size)

    def __str__(self):
        kernel = "x".join(map(str, self.kernel))
        size = "x".join(map(str, self.size))
        extra = f"-g{self.groups}" if self.groups > 1 else ""
        extra += "-mixed" if self.split == () else f"-split{self.split}" if self.split else ""
        extra += f"-d{self.dilation}" if self.dilation > 1 else ""
        channels = f"{self.in_channels}to{self.out_channels}"
        return f"{channels}-k{kernel}-s{self.stride}-p{self.padding}-{size}{extra}-{self.layout}"


CASES = [
    Case(16, 24, (5, 6, 7)),
    Case(24, 17, (3, 5, 7), layout="ncdhw"),
    Case(1, 5, (4, 3, 5)),
    Case(3, 7, (5, 1, 6), stride=(2, 2, 2), layout="ncdhw"),
    Case(5, 3, (1, 1, 1)),
    Case(17, 24, (1, 7, 5), kernel=(2, 2), padding=(1, 0)),
    Case(24, 16, (6, 5, 1), kernel=(4, 4), padding=(1, 2), stride=(2, 2, 2)),
    Case(8, 48, (5, 4, 3), kernel=(1, 1), padding=(0, 0)),
    Case(40, 20, (7, 5, 3), kernel=(1, 1), padding=(0, 0), stride=(2, 2, 2)),
    Case(8, 9, (7, 6, 5), stride=(3, 3, 3)),
    Case(8, 9, (7, 6, 5), stride=(1, 2, 3)),
    Case(8, 9, (5, 6, 5), dilation=2, padding=(2, 2), batch=1),
    Case(8, 9, (7, 6, 7), dilation=2, padding=(0, 3), stride=(2, 2, 2)),
    Case(8, 6, (5, 4, 5), kernel=(5, 5), padding=(2, 2), batch=1),
    Case(8, 6, (8, 9, 8), kernel=(7, 7), padding=(3, 3), stride=(2, 2, 2), batch=1),
    Case(8, 6, (3, 5, 4), kernel=(6, 6), padding=(2, 3), batch=1),
    Case(8, 6, (5, 6, 7), padding=(0, 0)),
    Case(8, 6, (4, 4, 4), padding=(2, 0)),
    Case(48, 96, (3, 4, 5)),
    Case(136, 70, (2, 3, 4), batch=1),
    Case(16, 12, (5, 4, 3), groups=2),
    Case(12, 20, (4, 5, 3), groups=4, layout="ncdhw"),
    Case(34, 10, (3, 4, 3), groups=2, stride=(2, 2, 2)),
    Case(8, 11, (4, 5, 6), split=(11, 0, 0)),
    Case(8, 11, (4, 5, 6), split=(0, 4, 7)),
    Case(8, 11, (4, 5, 6), split=(1, 0, 10), stride=(2, 2, 2)),
    Case(8, 9, (7, 6, 5), rule="aligned", stride=(2, 2, 2)),
    Case(8, 9, (6, 6, 6), rule="aligned", padding=(0, 0), dilation=2),
    Case(8, 12, (5, 6, 4), rule="planar", split=(12, 0, 0)),
    Case(8, 12, (5, 6, 4), rule="planar", split=(0, 0, 12), stride=(2, 1, 2), padding=(1, 1)),
    Case(16, 24, (4, 5, 3), split=()),
    Case(5, 7, (1, 5, 4), split=(), stride=(2, 2, 2), layout="ncdhw"),
    Case(12, 10, (5, 3, 4), split=(), kernel=(2, 2), padding=(1, 0), groups=2, batch=1),
    Case(8, 6, (5, 5, 4), split=(), dilation=2, padding=(2, 2), stride=(1, 2, 3), batch=1),
    Case(8, 6, (4, 5, 3), split=(), kernel=(5, 5), padding=(2, 2), rule="aligned", batch=1),
]

TYPICAL = [CASES[i] for i in (0, 1, 3, 12, 18, 20, 31)]
"""Those that are run in every dtype."""


@st.composite
def random_cases(draw, family="matrix"):
    """Small convolutions with any combination of arguments that a family of kernels computes."""
    if family == "depthwise":
        groups, per_group = draw(st.integers(2, 20)), 1
        out_channels = groups * draw(st.integers(1, 2))
    else:
        groups = 1 if family == "stem" else draw(st.sampled_from([1, 1, 1, 2, 3]))
        per_group = draw(st.integers(1, 4 if family == "stem" else 12))
        out_channels = groups * draw(st.integers(1, 12))
    mixed = [()] if family == "matrix" else []
    axial = draw(st.integers(0, out_channels))
    coronal = draw(st.integers(0, out_channels - axial))
    stride = draw(st.sampled_from([1, 2, 3]))
    kernel = draw(st.integers(1, 4))
    case = Case(
        groups * per_group,
        out_channels,
        draw(st.tuples(*[st.integers(1, 7)] * 3)),
        kernel=(kernel, kernel),
        stride=draw(st.sampled_from([(stride,) * 3, (1, 2, 3)])),
        padding=draw(st.tuples(*[st.integers(0, 2)] * 2)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        split=draw(st.sampled_from([None, (axial, coronal, out_channels - axial - coronal), *mixed])),
        rule=draw(st.sampled_from(["acsconv", "aligned"])),
        batch=draw(st.integers(1, 2)),
        layout=draw(st.sampled_from(list(LAYOUTS))),
    )
    try:
        case.geometry  # noqa: B018 - resolving it tells whether the kernel fits
    except ValueError:
        assume(False)
    return case
