"""Import: attention in all its spellings, and errors in the user's terms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.codegen.dataflow import Dataflow, op_of
from graphopt.codegen.importer import to_relax
from graphopt.errors import UnsupportedOp


class Attend(nn.Module):
    """scaled_dot_product_attention with fixed options; a mask, if any, is the fourth input."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)  # type: ignore[arg-type]


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


LOWER = torch.ones(5, 7).tril(2).bool()

CASES = {
    "plain": (Attend(), tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))),
    "value of another size": (Attend(), tensors((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 6))),
    "causal": (Attend(is_causal=True), tensors((1, 2, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8))),
    "scale": (Attend(scale=0.3), tensors((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8))),
    "boolean mask of rows": (Attend(), [*tensors((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8)), LOWER]),
    "float mask": (Attend(), tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (2, 1, 5, 7))),
    "mask per key": (Attend(), tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (2, 1, 1, 7))),
    "grouped heads": (Attend(enable_gqa=True), tensors((1, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8))),
    "causal, value of another size": (
        Attend(is_causal=True),
        [20 * t for t in tensors((1, 2, 7, 5), (1, 2, 7, 5), (1, 2, 7, 3))],
    ),
    "one batch of keys": (Attend(), tensors((3, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8))),
    "five dimensions": (Attend(), tensors((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), (3, 1, 5, 7))),
    "no heads": (Attend(), tensors((2, 5, 8), (2, 7, 8), (2, 7, 8))),
    "one matrix": (Attend(), tensors((5, 8), (7, 8), (7, 8))),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_agrees_with_pytorch(case: str) -> None:
    """Whatever the masks, ranks, scales and groups, the compiled program computes what PyTorch does."""
    module, inputs = CASES[case]
    with graphopt.compile(module, example_inputs=tuple(inputs)) as bundle:
        expected = module(*inputs)
        torch.testing.assert_close(torch.from_numpy(bundle(*inputs)), expected, rtol=2e-5, atol=2e-6)


def test_meaningful_operators_stay_whole() -> None:
    """Attention, layer norm and gelu reach the templates as themselves."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.up(self.norm(F.scaled_dot_product_attention(x, x, x))))

    program = graphopt.capture(Block(), tuple(tensors((1, 2, 5, 8))))
    ops = [op_of(b.value) for b in Dataflow(to_relax(program)["main"]).bindings]
    for op in ("relax.nn.attention", "relax.nn.layer_norm", "relax.nn.gelu", "relax.matmul"):
        assert ops.count(op) == 1, op


def test_unknown_operator_is_named_with_its_place() -> None:
    """An operator that nothing supports is an error that names it and the user's module."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.Sequential(nn.ReLU(), Inner())

        def forward(self, x: Tensor) -> Tensor:
            return self.stage(x)

    program = graphopt.capture(Outer(), (torch.ones(3),))
    with pytest.raises(UnsupportedOp, match=r"bessel_j0.*stage\.1") as caught:
        to_relax(program)
    assert "test_importer.py" in str(caught.value)
