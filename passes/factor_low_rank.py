"""Take linear layers (and convolutions) apart into two thin ones, by truncated singular value decomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Edit
from graphopt.passes.factoring import Factoring, Factors, Seen
from graphopt.passes.layers import Layer, layer_of, matrix_of, replace_layer


@dataclass(frozen=True)
class FactorLowRank(Factoring):
    """Replace y = W x + b by y = U (V x) + b with a short axis between, where that is less work.

        before  linear (o=768 i=3072)                                   o i multiply-adds
        after   linear (r=192 i=3072) -> linear (o=768 r=192)           r (i + o), with r < o i / (o + i)

    Without calibration data U V is W's truncated singular value decomposition, which is nearest to W. With data it is
    nearest to W in what comes out for that data: U has the r leading principal components of the layer's outputs, V is
    U^T W, and the mean of what is lost goes into the bias, where there is one. Layers that would not get smaller stay
    dense. The new axis can be shrunk like any other. Options are those of `Factoring`, and

    split: with `include` convolutions are taken apart, too: a k x k one into k x k and 1 x 1 ("channel"), or into k x 1
        and 1 x k ("space", always without data).

    Source: Wei et al., "Building on Efficient Foundations", NeurIPS 2024, arXiv:2406.16450 (LowRank); with data: Chen
    et al., DRONE, NeurIPS 2021; Wang et al., SVD-LLM, arXiv:2403.07378; "space": Jaderberg et al., arXiv:1405.3866.
    Differs: ranks are chosen per layer, where the first source gives all the same; no inverse of a covariance is
    needed, so data that does not span the inputs is no special case.
    """

    name: ClassVar[str] = "factor-low-rank"

    split: Literal["channel", "space"] = "channel"

    def layer(self, edit: Edit, node: Node) -> Layer | str | None:
        """See Factoring."""
        return layer_of(edit, node, self.split)

    def per_rank(self, layer: Layer) -> tuple[int, int]:
        """See Factoring."""
        return layer.ins + layer.outs, layer.first * layer.ins + layer.second * layer.outs

    def factors(self, layer: Layer, weight: Tensor, bias: Tensor | None, seen: Seen | None) -> Factors:
        """See Factoring."""
        matrix = matrix_of(layer, weight)
        if seen is None:
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            root = s.sqrt()
            return _Thin(u * root, root[:, None] * vh, s.square(), None)
        moments, mean = seen
        centred = moments - torch.outer(mean, mean) if bias is not None else moments
        values, vectors = torch.linalg.eigh(matrix @ centred @ matrix.T)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        return _Thin(vectors, vectors.T @ matrix, values, matrix @ mean if bias is not None else None)


@dataclass(frozen=True)
class _Thin(Factors):
    """U (outs, k) and V (k, ins) of full rank, most important first; `mean` (outs,) of W x where it may move."""

    left: Tensor
    right: Tensor
    energy: Tensor
    mean: Tensor | None

    def put(self, edit: Edit, layer: Layer, rank: int) -> None:
        """See Factors."""
        u, v = self.left[:, :rank], self.right[:rank]
        shift = None if self.mean is None else self.mean - u @ (u.T @ self.mean)
        replace_layer(edit, layer, v, u, shift)
