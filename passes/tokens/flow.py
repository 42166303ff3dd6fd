"""AdaToken-3D's allocation: how much flows from visual tokens, layer by layer, and the curve of how many are kept.

Source: AdaToken-3D, arXiv:2505.12782. Differs: attention is read where the query stands behind the key, since the other
half is zero in causal models; maps are summed as they are, not pooled first; contributions and curve are both shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.calibration import Calibration
from graphopt.observe import watch
from graphopt.passes.tokens.attention import Attention
from graphopt.passes.tokens.view import View, heads, repeated
from graphopt.program import Program
from graphopt.region import Span

_IN_FRONT, _BEHIND = 0.7, 0.3  # of what flows between text and visual tokens, by where the text stands
_PASSED_ON = 0.73  # of what flows among visual tokens, to all later layers
_INTRA, _INTER, _RUNNING = 0.4, 0.3, 0.3  # of a layer's contribution
_STEEPEST, _POINTS, _ROUNDS = 80.0, 401, 6  # of rates, in lengths of the whole


def flows(
    program: Program, attentions: Sequence[Attention], samples: int, span: Span, data: Calibration
) -> tuple[Tensor, Tensor]:
    """The attention that flows among the tokens of a span, and between them and the text around; mean over samples.

    Args:
        program: has the nodes of the attentions by name.
        attentions: of one stream, layer by layer.
        samples: in a batch.
        span: the visual tokens.
        data: what it runs on.

    Returns:
        intra (layers,) and inter (layers,).
    """
    intra, inter = torch.zeros(len(attentions)), torch.zeros(len(attentions))
    layers = {attention.node.name: number for number, attention in enumerate(attentions)}
    wanted: set[str] = set(layers)
    for attention in attentions:
        if attention.fused:
            wanted |= {node.name for node in (attention.query, attention.key, attention.mask) if isinstance(node, Node)}
    values: dict[str, Tensor] = {}

    def see(name: str, value: Any) -> None:
        if name not in layers:
            values[name] = value
            return
        attention = attentions[layers[name]]
        rows = _map(attention, values, samples) if attention.fused else heads(value, samples).mean(1)
        first, visual, last = slice(0, span.start), slice(span.start, span.stop), slice(span.stop, None)
        own = rows.mean(0)
        intra[layers[name]] += own[visual, visual].tril(-1).sum()
        inter[layers[name]] += _IN_FRONT * own[visual, first].sum() + _BEHIND * own[last, visual].sum()
        for node in (attention.query, attention.key):
            values.pop(node.name, None)

    watch(program, data, wanted, see)
    return intra / len(data), inter / len(data)


def _map(attention: Attention, values: dict[str, Tensor], samples: int) -> Tensor:
    """The map of a fused attention, mean over heads, (b, n, n)."""
    query, key = heads(values[attention.query.name], samples), heads(values[attention.key.name], samples)
    mask = values[attention.mask.name] if isinstance(attention.mask, Node) else None
    key = repeated(key, query.shape[1])
    view = View(query, query, key, mask=mask, scale=attention.scale, causal=attention.causal)
    return view.rows(slice(None)).mean(1)


def contributions(intra: Tensor, inter: Tensor) -> Tensor:
    """What each layer has of visual tokens, (layers,), from 0 to 1: what flows in it, and what flowed so far."""
    running = intra[0] + _PASSED_ON * (intra.cumsum(0) - intra[0])
    found = _INTRA * intra + _INTER * inter + _RUNNING * running
    low, high = found.min(), found.max()
    return (found - low) / (high - low) if high > low else torch.ones_like(found)


@dataclass(frozen=True)
class Curve:
    """The share of the tokens that is kept in layer x, from 1: all in the first, `last` in the last of `layers`.

    A exp(-rate (x - 1)) + D          A and D are what the two ends ask for; straight where rate = 0
    """

    rate: float
    last: float
    layers: int

    def __call__(self, layer: float) -> float:
        return float(self.at(torch.tensor([float(layer)], dtype=torch.float64))[0])

    def at(self, layers: Tensor) -> Tensor:
        """The shares of several layers, in double precision."""
        reach = max(self.layers - 1, 1)
        x = (layers.double() - 1).clamp(0, reach)
        if abs(self.rate * reach) < 1e-9:
            return 1 + (self.last - 1) * x / reach
        return 1 + (self.last - 1) * torch.expm1(-self.rate * x) / math.expm1(-self.rate * reach)


def fitted(values: Tensor, last: float) -> Curve:
    """The curve that is nearest to values (layers,) and to their differences, by least squares.

    Nothing but its rate is free: it is looked for among many, then ever closer around the best.
    """
    layers = len(values)
    if layers < 2:
        return Curve(0.0, last, layers)
    wanted = values.double()
    slopes = torch.gradient(wanted)[0]
    places = torch.arange(1, layers + 1)

    def error(rate: float) -> float:
        found = Curve(rate, last, layers).at(places)
        return float((found - wanted).square().sum() + (torch.gradient(found)[0] - slopes).square().sum())

    middle, reach = 0.0, _STEEPEST / (layers - 1)
    for _ in range(_ROUNDS):
        rates = [middle + reach * (2 * point / (_POINTS - 1) - 1) for point in range(_POINTS)]
        middle = min(rates, key=error)
        reach *= 4 / (_POINTS - 1)
    return Curve(middle, last, layers)
