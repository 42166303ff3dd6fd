"""Programs in which a careless rule would be wrong: each is cut on every free axis and compared with the masked one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.axes import infer
from graphopt.shrink import shrink
from tests.graphopt.axes.single import assert_equal, assert_shrinks
from tests.masking import masked_run
from tests.programs import program_of

X = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(1, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def layers(*sizes: tuple[int, int]) -> dict[str, nn.Module]:
    """Linear layers a, b, c."""
    torch.manual_seed(0)
    return {name: nn.Linear(*size).double() for name, size in zip("abc", sizes, strict=False)}


TRAPS = {
    # A dimension that shrinks to 1 must not be squeezed away with one that is 1.
    "squeeze": lambda net, x: net.b(net.a(x)[:, None].squeeze()),
    # The same atom in both dimensions of one tensor, and in one product.
    "gram": lambda net, x: net.b((net.a(x).mT @ net.a(x)).softmax(-1).sum(0)[None]),
    "gram_flat": lambda net, x: (net.a(x).mT @ net.a(x)).flatten() @ net.b.weight.mT.repeat(8, 1)[: 8 * 8],
    # 1 / n as a number stays, though n does not.
    "mean_by_hand": lambda net, x: net.b(net.a(x) - net.a(x).sum(-1, keepdim=True) * (1 / 8)),
    # Extent 1 on one side only.
    "broadcast": lambda net, x: net.b(net.a(x) * net.a(x).amax(-1, keepdim=True) + net.a(x)[:, :1]),
    # A mask made of what is masked.
    "own_mask": lambda net, x: net.b(torch.where(net.a(x) > 0.1, net.a(x), -1e9).softmax(-1)),
    "infinite": lambda net, x: net.b(net.a(x).masked_fill(net.a(x) < 0, float("-inf")).exp()),
    # Items by number: what is sorted, counted or accumulated stays whole.
    "cumsum": lambda net, x: net.b(net.a(x).cumsum(-1)),
    "argmax": lambda net, x: net.b(F.one_hot(net.a(x).argmax(-1), 8).to(x.dtype)),
    "topk": lambda net, x: net.b(torch.zeros(2, 8, dtype=x.dtype).scatter(1, *net.a(x).topk(3, -1)[::-1])),
    "arange": lambda net, x: net.b(net.a(x) * torch.arange(8, dtype=x.dtype)),
    # Sizes as numbers.
    "view_with_minus_one": lambda net, x: net.b(net.a(x).view(-1, 4).relu().view(2, -1)),
    "new_zeros": lambda net, x: net.b(torch.cat([net.a(x)[:, :5], x.new_zeros(2, 3)], 1)),
    "empty": lambda net, x: net.b(torch.cat([net.a(x), net.a(x)[:, 8:]], 1)),
    "pad": lambda net, x: net.b(F.pad(net.a(x)[:, :-3], (1, 2), value=0.5)),
    "roll": lambda net, x: net.b(net.a(x).roll(2, 1)),
    "flip_halves": lambda net, x: net.b(net.a(x).view(2, 2, 4).flip(1).flatten(1)),
    # A statistic and the same values again.
    "norm_twice": lambda net, x: net.b(F.layer_norm(net.a(x), (8,)) + F.normalize(net.a(x), dim=-1)),
    # Expanded, then written to.
    "expand_and_write": lambda net, x: net.b(net.a(x)[:1].expand(2, 8).index_fill(0, torch.tensor([1]), 0.5)),
    # Complex numbers in pairs.
    "complex": lambda net, x: net.b(
        torch.view_as_real(torch.view_as_complex(net.a(x).view(2, 4, 2)) * torch.polar(x[:, :4], x[:, :4])).flatten(1)
    ),
    "distance": lambda net, x: net.b(torch.cdist(net.a(x).mT, net.a(x).mT).softmax(-1)[:2]),
    "strided": lambda net, x: net.b(torch.stack([net.a(x)[:, ::2], net.a(x)[:, 1::2]], -1).flatten(1)),
    "as_strided": lambda net, x: net.b(net.a(x).as_strided((2, 8), (1, 2))),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str) -> None:
    """Shrunk equals masked, whatever is left free."""
    program = program_of(TRAPS[name], X, **layers((6, 8), (8, 3)))
    assert_shrinks(program, tolerance=1e-9)


@pytest.mark.parametrize("name", ["cumsum", "argmax", "topk", "arange", "roll", "as_strided"])
def test_items_by_number_are_pinned(name: str) -> None:
    """The hidden axis of each is none that may shrink."""
    axes = infer(program_of(TRAPS[name], X, **layers((6, 8), (8, 3))))
    assert not axes.free()


def test_views_that_need_a_memory_order() -> None:
    """A view that is one only because weights are channels-last still works when slices of them are not."""
    conv, out = nn.Conv2d(3, 8, 3).double().to(memory_format=torch.channels_last), nn.Linear(8, 3).double()

    def net(self, x: Tensor) -> Tensor:
        return self.out(torch.ops.aten.view(self.conv(x).permute(0, 2, 3, 1), [16, 8]))

    assert_shrinks(program_of(net, IMAGE.to(memory_format=torch.channels_last), conv=conv, out=out))


def test_down_to_one_item() -> None:
    """One channel of each is left: groups, heads and neurons of extent 1 are still dimensions."""
    first, each, norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GroupNorm(4, 8)
    last, head = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)
    modules = {name: m.double() for name, m in (("first", first), ("each", each), ("norm", norm), ("last", last))}

    def net(self, x: Tensor) -> Tensor:
        y = self.last(F.prelu(self.norm(self.each(self.first(x))), torch.full((8,), 0.2, dtype=x.dtype)))
        return self.head(F.adaptive_avg_pool2d(y, 1).squeeze(-1).squeeze(-1))

    axes = infer(program_of(net, IMAGE, **modules, head=head.double()))
    assert len(axes.free()) >= 3
    keep = {atom: [atom.extent - 1] for atom in axes.free()}
    examples = axes.program.example_inputs
    assert_equal(shrink(axes, keep).run(examples), masked_run(axes, keep, examples), 1e-9, keep)
