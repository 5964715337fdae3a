"""How each layer of a network is lifted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase

from torch import nn

KINDS = ("acs", "soft", "mean", "2.5d", "3d")
INFLATIONS = ("repeat", "centre")


@dataclass(frozen=True)
class Lift:
    """How a module is lifted.

    Attributes:
        kind: one of :data:`KINDS`.
        path: the module's name in the network.
        folds: whether a volume given to the module is folded into slices; not so for what
            contains native 3D modules, nor for what stands beside them and contains no 2D ones.
        axis: axis of the volume ``(N, C, D, H, W)`` across the plane of the 2D network: 2, 3 or 4.
        inflation: one of :data:`INFLATIONS`.
        split: output channels of the three views, or None for a third each.
        depth_stride: stride along depth, or None for the smaller one of the plane.
        aligned: as for :func:`acs_triton.functional.acs_conv3d`.
        adapts_channels: the layer was given other input channels than its 2D checkpoints have.
    """

    kind: str
    path: str
    folds: bool = True
    axis: int = 2
    inflation: str = "repeat"
    split: tuple[int, int, int] | None = None
    depth_stride: int | None = None
    aligned: bool = False
    adapts_channels: bool = False

    @property
    def across(self) -> int:
        """The axis that is folded. Dense kernels have their own orientation, so D will do for them."""
        return 2 if self.kind == "3d" else self.axis


RULE_KEYS = ("kind", "split", "depth_stride", "aligned")
assert set(RULE_KEYS) <= {field.name for field in fields(Lift)}


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")


class LayerRules:
    """The ``rules`` argument of ``convert``: options for the layers that a pattern or a function picks."""

    def __init__(self, rules: Mapping[str, Mapping] | Callable[[str, nn.Module], Mapping | None] | None):
        if rules is not None and not callable(rules) and not isinstance(rules, Mapping):
            raise TypeError(f"rules must be a mapping of name patterns to options, or a function, got {rules!r}")
        self.rules = rules or {}
        self.unused = set() if callable(self.rules) else set(self.rules)

    def apply(self, lift: Lift, module: nn.Module) -> Lift:
        """``lift`` with the options for this module; of several matching patterns the last one counts."""
        if callable(self.rules):
            options = self.rules(lift.path, module) or {}
            return replace(lift, **self._checked(options, f"rules({lift.path!r}, ...)"))
        for pattern, options in self.rules.items():
            if fnmatchcase(lift.path, pattern):
                self.unused.discard(pattern)
                lift = replace(lift, **self._checked(options, f"rules[{pattern!r}]"))
        return lift

    def check_all_used(self) -> None:
        if self.unused:
            raise ValueError(f"rules: no module is named like {', '.join(map(repr, sorted(self.unused)))}")

    @staticmethod
    def _checked(options: Mapping, name: str) -> dict:
        unknown = set(options) - set(RULE_KEYS)
        if unknown:
            raise ValueError(f"{name} has unknown options {sorted(unknown)}; there are {', '.join(RULE_KEYS)}")
        checked = dict(options)
        if "kind" in checked:
            check_kind(checked["kind"])
        if checked.get("split") is not None:
            checked["split"] = tuple(checked["split"])
        stride = checked.get("depth_stride")
        if stride is not None and not (isinstance(stride, int) and stride > 0):
            raise ValueError(f"{name}: depth_stride must be a positive int, got {stride!r}")
        return checked
