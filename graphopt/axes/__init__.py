"""Axes: einops for whole programs. Every dimension is a product or concatenation of axes that tensors share."""

from graphopt.axes.axes import ROLES, Axes, Occurrence, results_of
from graphopt.axes.axis import Axis, atoms, find, show
from graphopt.axes.infer import infer
from graphopt.axes.keep import Choice, Keep, extent, index, owner, touched

__all__ = [
    "ROLES",
    "Axes",
    "Axis",
    "Choice",
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
    "touched",
]
