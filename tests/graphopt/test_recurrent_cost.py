"""Recurrent layers: multiply-adds of all steps, layers, directions and projections, as numbers and as polynomials."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.fx import Graph
from torch.utils.flop_counter import FlopCounterMode

from graphopt import optimize
from graphopt.axes import infer
from graphopt.cost import cost_model, node_cost, summary
from graphopt.shrink import shrink
from tests.programs import hard, program_of

LAYERS = {
    "LSTM": (nn.LSTM, {}),
    "LSTM, stacked both ways": (nn.LSTM, {"num_layers": 3, "bidirectional": True}),
    "LSTM without biases": (nn.LSTM, {"num_layers": 2, "bias": False, "batch_first": True}),
    "LSTM, projected": (nn.LSTM, {"proj_size": 3, "bidirectional": True, "num_layers": 2}),
    "LSTM, projected, without biases": (nn.LSTM, {"proj_size": 3, "bias": False}),
    "GRU": (nn.GRU, {}),
    "GRU, stacked both ways": (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "RNN": (nn.RNN, {}),
    "RNN, relu, both ways": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}
CELLS = {"LSTM": (nn.LSTMCell, {}), "GRU": (nn.GRUCell, {}), "RNN": (nn.RNNCell, {"bias": False})}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_agree_with_torch(name):
    """2 * macs is what torch.utils.flop_counter counts where the layer runs as single products, steps and all."""
    cls, options = LAYERS[name]
    module, x = cls(5, 7, **options), torch.randn(4, 3, 5)
    # oneDNN's layer is one operator, which the counter does not know.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        module(x)
    assert 2 * summary(program_of(lambda s, x: s.m(x)[0], x, m=module)).total.macs == counter.get_total_flops() > 0


@pytest.mark.parametrize("name", CELLS)
def test_cells_agree_with_torch(name):
    """A single step likewise."""
    cls, options = CELLS[name]
    module, x = cls(5, 7, **options), torch.randn(4, 5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    assert 2 * summary(program_of(lambda s, x: s.m(x), x, m=module)).total.macs == counter.get_total_flops() > 0


def test_counted_by_hand():
    """Products, then biases and gates: 19 FLOPs for each element of an LSTM's state at each step, 14 of a GRU's."""
    steps = 4 * 3
    lstm = summary(program_of(lambda s, x: s.m(x)[0], torch.ones(4, 3, 5), m=nn.LSTM(5, 7, 2))).total
    assert lstm.macs == steps * (4 * 7 * (5 + 7) + 4 * 7 * (7 + 7))
    assert lstm.flops == 2 * lstm.macs + steps * 2 * (2 * 4 * 7 + 19 * 7)
    gru = summary(program_of(lambda s, x: s.m(x)[0], torch.ones(4, 3, 5), m=nn.GRU(5, 7, bias=False))).total
    assert gru.macs == steps * 3 * 7 * (5 + 7)
    assert gru.flops == 2 * gru.macs + steps * 14 * 7
    projected = summary(program_of(lambda s, x: s.m(x)[0], torch.ones(4, 3, 5), m=nn.LSTM(5, 7, proj_size=2))).total
    assert projected.macs == steps * (4 * 7 * (5 + 2) + 2 * 7)


def test_packed_sequences_count_their_own_steps():
    """A batch of sequences of 4, 2 and 1 steps has 7 steps, not 12."""
    packed = nn.utils.rnn.pack_padded_sequence(torch.ones(4, 3, 5), torch.tensor([4, 2, 1]))
    values = [packed.data, packed.batch_sizes, torch.ones(1, 3, 7), *nn.LSTM(5, 7).parameters()]
    graph = Graph()
    for n, value in enumerate(values):
        graph.placeholder(f"x{n}").meta["val"] = value
    x, sizes, state, *weights = graph.nodes
    flags = (True, 1, 0.0, False, False)
    node = graph.call_function(torch.ops.aten.lstm.data, (x, sizes, [state, state], weights, *flags))
    node.meta["val"] = [torch.ones(7, 7), values[2], values[2]]
    assert node_cost(node).macs == 7 * 4 * 7 * (5 + 7)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_polynomials_equal_the_cost_of_the_shrunk_program(name):
    """Whatever size the state and what comes in and goes out of a network have, both directions and all layers."""
    axes = infer(hard(name))
    model, rng = cost_model(axes), random.Random(name)
    assert model.at() == summary(axes.program).total
    for _ in range(5):
        sizes = {axis: rng.randint(1, axis.extent) for axis in axes.free()}
        keep = {axis: rng.sample(range(axis.extent), size) for axis, size in sizes.items()}
        assert model.at(sizes) == summary(shrink(axes, keep)).total


def test_budgets_see_the_state():
    """Half of the FLOPs of a network that is an LSTM above all: its state has to shrink for that."""
    program = program_of(
        lambda s, x: s.b(s.a(x)[0]), torch.randn(2, 12, 16), a=nn.LSTM(16, 48, 2, batch_first=True), b=nn.Linear(48, 4)
    )
    small = optimize(program, passes=["prune"], options={"step": 1}, flops=0.5)
    share = summary(small).total.flops / summary(program).total.flops
    assert 0.46 <= share <= 0.5  # both layers have one state: 48 items, of which each is 4 % of the work
    assert summary(small).total.params < 0.6 * summary(program).total.params
