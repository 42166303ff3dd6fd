"""No index leads out of its tensor."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt


class Look(nn.Module):
    """The same indices used in four ways."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(12.0).reshape(6, 2))
        self.register_buffer("last", torch.tensor([-1, 0, -6]))

    def forward(self, i: Tensor) -> tuple[Tensor, ...]:
        picked = self.table[i]
        return F.embedding(i.abs(), self.table), picked, self.table.gather(0, i.abs()[:, None]), self.table[self.last]


def test_indices_in_range_agree_with_pytorch() -> None:
    """Positive and negative ones, constant and not."""
    i = torch.tensor([0, -3, 5, -5])
    with graphopt.compile(Look(), example_inputs=(i,)) as bundle:
        for got, want in zip(bundle.run({"i": i}).values(), Look()(i), strict=True):
            np.testing.assert_array_equal(got, want.detach())


def test_indices_out_of_range_are_moved_to_the_nearest() -> None:
    """Where PyTorch raises an error, the artefact reads the first or last row, and never foreign memory."""
    with graphopt.compile(Look(), example_inputs=(torch.tensor([0, 1, 2, 3]),)) as bundle:
        looked, picked, gathered, _ = bundle.run({"i": torch.tensor([10**12, -(10**12), 6, -7])}).values()
    table = np.arange(12.0, dtype=np.float32).reshape(6, 2)
    np.testing.assert_array_equal(looked, table[[5, 5, 5, 5]])
    np.testing.assert_array_equal(picked, table[[5, 0, 5, 0]])
    np.testing.assert_array_equal(gathered, table[[5, 5, 5, 5], :1])
