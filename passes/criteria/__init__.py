"""Criteria: how much each item of an axis matters. One per file or small family; the table is the registry."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.passes.criteria.base import Criterion

CRITERIA: dict[str, str] = {
    # from weights alone
    "l1": "graphopt.passes.criteria.magnitude:L1",
    "l2": "graphopt.passes.criteria.magnitude:L2",
    "bn-scale": "graphopt.passes.criteria.bn_scale:BnScale",
    "geometric-median": "graphopt.passes.criteria.geometric_median:GeometricMedian",
    "snr": "graphopt.passes.criteria.snr:Snr",
    # from data, without labels
    "activation": "graphopt.passes.criteria.activation:Activation",
    "wanda": "graphopt.passes.criteria.wanda:Wanda",
    "beta-rank": "graphopt.passes.criteria.beta_rank:BetaRank",
    "optin": "graphopt.passes.criteria.optin:Optin",
    # from gradients; labels where there are some
    "taylor": "graphopt.passes.criteria.taylor:Taylor",
    "hessian": "graphopt.passes.criteria.hessian:Hessian",
    # the control
    "random": "graphopt.passes.criteria.random:Random",
}


def load(name: str) -> type[Criterion]:
    """The class of a registered criterion. Raises KeyError where there is none."""
    module, _, attribute = CRITERIA[name].partition(":")
    return getattr(import_module(module), attribute)


def make(name: str, **options: Any) -> Criterion:
    """A registered criterion with its options. Raises KeyError for an unknown name, TypeError for an unknown option."""
    return load(name)(**options)
