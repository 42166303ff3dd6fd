"""What a program costs: FLOPs, multiply-adds, parameters, bytes, memory; as numbers and as functions of its axes.

`summary` counts a program as it is. `cost_model` gives the same as polynomials in the extents of the axes that may be
shrunk, so that a budget is solved without shrinking anything.
"""

from graphopt.cost.latency import LatencyModel, alignment, latency_model
from graphopt.cost.latency_table import LatencyTable
from graphopt.cost.model import CostModel, ModelRow, cost_model
from graphopt.cost.polynomial import Compiled, Polynomial, Sizes
from graphopt.cost.table import Cost, Row, Summary, node_cost, summary

__all__ = [
    "Compiled",
    "Cost",
    "CostModel",
    "LatencyModel",
    "LatencyTable",
    "ModelRow",
    "Polynomial",
    "Row",
    "Sizes",
    "Summary",
    "alignment",
    "cost_model",
    "latency_model",
    "node_cost",
    "summary",
]
