"""The rules: what becomes of each torch function when its operands are batches of slices.

A rule is a row in :data:`RULES`, keyed by the function's name (one name serves the function, the
method and their in-place forms). A function without a rule is refused, so nothing is ever
computed across slices, or along too few axes, by accident.
"""

from . import elementwise, layout, normalization, reductions, rowwise, spatial  # noqa: F401  fill the table
from .table import QUERIES, RULES, function_name

__all__ = ["QUERIES", "RULES", "function_name"]
