"""Axes: einops for whole programs. Every dimension is a product or concatenation of axes that tensors share."""

from graphopt.axes.axis import Axis, Keep, atoms, extent, find, index, owner, show
from graphopt.axes.infer import ROLES, Axes, Occurrence, infer, results_of

__all__ = [
    "ROLES",
    "Axes",
    "Axis",
    "Keep",
    "Occurrence",
    "atoms",
    "extent",
    "find",
    "index",
    "infer",
    "owner",
    "results_of",
    "show",
]
