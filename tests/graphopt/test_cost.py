"""Cost: FLOPs, parameters and bytes against PyTorch's own counter and against counting by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from graphopt.cost import Cost, node_cost, summary
from tests.models import TINY, ZOO
from tests.programs import program_of, tiny


@pytest.mark.parametrize("name", TINY)
def test_multiply_adds_agree_with_torch(name):
    """On every model of the zoo 2 * macs is what torch.utils.flop_counter counts, and the parameters are torch's."""
    module, inputs = TINY[name]()
    # The counter does not know attention's CPU kernel, nor oneDNN's LSTM; the plain forms are products that it knows.
    plain = sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain[0], plain[1]:
        module(**inputs)
    total = summary(tiny(name)).total
    assert 2 * total.macs == counter.get_total_flops()
    assert total.params == sum(p.numel() for p in module.parameters())


def test_resnet50_costs_what_everybody_says():
    """4.09 G multiply-adds and 25.6 M parameters; counted on meta tensors, so nothing is computed."""
    with torch.device("meta"):
        module, _ = ZOO["resnet50"]()
        with FlopCounterMode(display=False) as counter:
            module(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(4.09e9, rel=0.01)
    assert sum(p.numel() for p in module.parameters()) == 25_557_032


CASES = {
    "linear": (lambda s, x: s.m(x), (4, 3), nn.Linear(3, 5), 4 * 3 * 5, 2 * 60 + 20),
    "linear without bias": (lambda s, x: s.m(x), (4, 3), nn.Linear(3, 5, bias=False), 60, 120),
    "conv1d, strided": (lambda s, x: s.m(x), (1, 4, 9), nn.Conv1d(4, 6, 3, 2), 6 * 4 * 4 * 3, 2 * 288 + 24),
    "conv2d, grouped": (lambda s, x: s.m(x), (1, 4, 5, 5), nn.Conv2d(4, 8, 3, groups=2), 8 * 9 * 2 * 9, 2 * 1296 + 72),
    "conv3d": (lambda s, x: s.m(x), (1, 1, 3, 3, 3), nn.Conv3d(1, 2, 2, bias=False), 16 * 8, 256),
    "transposed": (lambda s, x: s.m(x), (1, 4, 3, 3), nn.ConvTranspose2d(4, 6, 2, 2, bias=False), 4 * 9 * 6 * 4, 1728),
    "matmul": (lambda s, x: x @ x.transpose(1, 2), (2, 3, 4), None, 2 * 9 * 4, 144),
    "einsum": (lambda s, x: torch.einsum("bij,bkj->bik", x, x), (2, 3, 4), None, 72, 144),
    "einsum, dots": (lambda s, x: torch.einsum("...ij,kj->...ik", x, x[0]), (2, 3, 4), None, 2 * 9 * 4, 144),
    "einsum, one after another": (lambda s, x: torch.einsum("ij,jk,kl->il", x, x.T, x), (2, 3), None, 24, 48),
    "einsum, nothing summed": (lambda s, x: torch.einsum("ij,ij->ij", x, x), (2, 3), None, 0, 6),
    "einsum, summed before": (lambda s, x: torch.einsum("ij,kj->i", x, x), (2, 3), None, 6, 12),
    "einsum of one": (lambda s, x: torch.einsum("ij->i", x), (2, 3), None, 0, 2),
    "relu": (lambda s, x: x.relu(), (2, 3), None, 0, 6),
    "softmax": (lambda s, x: x.softmax(-1), (2, 3), None, 0, 30),
    "mean": (lambda s, x: x.mean(-1), (2, 3), None, 0, 6),
    "max pool": (lambda s, x: F.max_pool2d(x, 2), (1, 1, 4, 4), None, 0, 16),
    "average pool": (lambda s, x: F.avg_pool1d(x, 3), (1, 1, 9), None, 0, 9),
    "pool of all": (lambda s, x: F.avg_pool2d(x, 320, ceil_mode=True), (1, 2, 3, 2), None, 0, 12),
    "views": (lambda s, x: x.transpose(0, 1)[1:].unsqueeze(0), (2, 3), None, 0, 0),
    "movement": (lambda s, x: torch.cat([x, x]), (2, 3), None, 0, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_counted_by_hand(name):
    """Operator by operator, against numbers worked out from the definition."""
    function, shape, module, macs, flops = CASES[name]
    total = summary(program_of(function, torch.ones(shape), **({"m": module} if module else {}))).total
    assert (total.macs, total.flops) == (macs, flops)


def test_attention():
    """Two products and a softmax over (heads, n, s); keys may be longer than queries."""
    q, k = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 5, 8)
    total = summary(program_of(lambda s, q, k: F.scaled_dot_product_attention(q, k, k), q, k)).total
    assert total.macs == 2 * 3 * 5 * (8 + 8)
    assert total.flops == 2 * total.macs + 2 * 3 * 5 * 6


def test_bytes():
    """Each operand once and the result once; a view nothing; a look-up only the rows that it takes."""
    add = program_of(lambda s, x, y: x + y, torch.ones(2, 3), torch.ones(3))
    assert summary(add).total == Cost(flops=6, bytes_read=4 * (6 + 3), bytes_written=4 * 6)
    view = program_of(lambda s, x: x.view(3, 2), torch.ones(2, 3))
    assert summary(view).total == Cost()
    table = nn.Embedding(1000, 8)
    look_up = summary(program_of(lambda s, ids: s.t(ids), torch.zeros(5, dtype=torch.int64), t=table)).total
    assert look_up == Cost(params=8000, bytes_read=5 * 8 * 4 + 5 * 8, bytes_written=5 * 8 * 4)
    half = program_of(lambda s, x: x + 1, torch.ones(4, dtype=torch.float16))
    assert summary(half).total.bytes_read == 8


def test_rows_name_layers_and_add_up():
    """A row per call, with the user's name for it; the total is their sum; shared parameters count once."""
    table = summary(tiny("gpt2"))
    assert sum((row.cost for row in table.rows), Cost()) == table.total
    mlp = [row for row in table.rows if row.where.startswith("blocks.0.mlp.0 ")]
    assert [(row.op, row.shape, row.cost.params) for row in mlp] == [("aten.linear", (1, 16, 128), 32 * 128 + 128)]
    assert table.ops["aten.linear"] == 9
    assert table.stored_bytes == tiny("gpt2").parameters_bytes


def test_unknown_operators_count_as_elementwise():
    """An operator that the tables do not name is one FLOP per element of its result."""
    node = next(n for n in program_of(lambda s, x: torch.erfinv(x), torch.ones(7)).graph.nodes if n.users and n.args)
    assert node_cost(node).flops == 7
