"""CoreMatching's neurons: which fire for a token, which are the core of a sentence, and where a curve of matches bends.

Source: Wang et al., CoreMatching, ICML 2025, arXiv:2505.19235; a neuron fires where what the last layer of the
feed-forward part reads is above 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HAIR = 1e-3  # of a neuron, lest a whole number of them be rounded up to the next
_VECTOR, _MANY = 16, 256  # neurons: kernels read rows of weights that are inputs in place where they are whole vectors
_STRAIGHT = 1e-6  # of the plot's area: what is nearer to the chord is rounding


def core_size(neurons: int, beta: float) -> int:
    """How many of the neurons are a sentence's core: a share, rounded up; of many, to whole vectors."""
    step = _VECTOR if neurons >= _MANY else 1
    return min(neurons, step * max(1, math.ceil((beta * neurons - _HAIR) / step)))


def core_neurons(hidden: Tensor, rho: float, beta: float) -> Tensor:
    """The core neurons of each sentence.

    A token's core are those of the neurons that fire for it that are among its `rho` strongest, rounded up; a
    sentence's are those that are in the cores of most of its tokens, the earlier of two first.

    Args:
        hidden: (b, n, neurons), any floating dtype.
        rho: a share, above 0, up to 1.
        beta: a share of all neurons, above 0, up to 1.

    Returns:
        (b, core_size) int64, strictly increasing along the last dimension.
    """
    neurons = hidden.shape[-1]
    most = core_size(neurons, rho)
    fired = hidden > 0
    strongest = hidden.topk(most, -1).values
    count = (fired.sum(-1, keepdim=True).float() * rho - _HAIR).ceil().clamp(1, most).to(torch.int64)
    weakest = strongest.gather(-1, count - 1)
    often = (fired & (hidden >= weakest)).sum(1)  # (b, neurons)
    distinct = often * neurons - torch.arange(neurons)
    return distinct.topk(core_size(neurons, beta), -1).indices.sort(-1).values


def matches(hidden: Tensor, core: Tensor) -> Tensor:
    """How many core neurons (b, k) fire for each token: (b, n) int64."""
    samples, _, neurons = hidden.shape
    among = torch.zeros(samples, neurons).scatter(1, core, torch.ones(core.shape))
    return torch.matmul((hidden > 0).float(), among[..., None])[..., 0].to(torch.int64)


def elbow(curve: Tensor) -> int:
    """How many values of a falling curve (n,) stand in front of its elbow; all where it is straight.

    The elbow is the point farthest from the line through the first and the last point, the first of such. What is above
    its value stays; where the curve runs above that line there, it does, too.
    """
    values = curve.double()
    count = len(values)
    rise, place = values[-1] - values[0], torch.arange(count)
    # Multiples of the distance, the same for all points, so scaling either side of the plot changes nothing.
    apart = (values - values[0]) * (count - 1) - place * rise
    farthest = int(apart.abs().argmax())
    if float(apart[farthest].abs()) <= _STRAIGHT * float(rise.abs()) * count:
        return count
    return farthest + 1 if apart[farthest] > 0 else farthest
