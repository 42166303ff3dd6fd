"""Recurrent nets, state-space models and mixtures of experts, for the table in `hard_nets.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.convnets import conv_bn


class ConvGru(nn.Module):
    """A gated recurrent unit of convolutions: the state's channels are an input's, an output's and a gate's."""

    def __init__(self, state: int, i: int) -> None:
        super().__init__()
        self.z, self.r, self.q = (nn.Conv2d(state + i, state, 3, padding=1) for _ in range(3))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        both = torch.cat([h, x], 1)
        z, r = torch.sigmoid(self.z(both)), torch.sigmoid(self.r(both))
        q = torch.tanh(self.q(torch.cat([r * h, x], 1)))
        return (1 - z) * h + z * q


class Raft(nn.Module):
    """RAFT's structure (arXiv:2003.12039): features of two images, all their products, three updates of one flow."""

    def __init__(self, state: int = 12, context: int = 9, features: int = 14, side: int = 6) -> None:
        super().__init__()
        self.state, self.context = state, context
        self.features = nn.Sequential(conv_bn(3, 10, 3, 2), nn.Conv2d(10, features, 3, 2, 1))
        self.enter = nn.Sequential(conv_bn(3, 8, 3, 2), nn.Conv2d(8, state + context, 3, 2, 1))
        self.near, self.flow = nn.Conv2d(side * side, 15, 1), nn.Conv2d(2, 7, 3, padding=1)
        self.motion = nn.Conv2d(15 + 7, 11 - 2, 3, padding=1)
        self.unit = ConvGru(state, context + 11)
        self.head = nn.Sequential(nn.Conv2d(state, 13, 3, padding=1), nn.ReLU(), nn.Conv2d(13, 2, 3, padding=1))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        left, right = (self.features(image) for image in (first, second))
        b, c, h, w = left.shape
        products = torch.matmul(left.view(b, c, h * w).transpose(1, 2), right.view(b, c, h * w)) / c**0.5
        products = products.transpose(1, 2).reshape(b, h * w, h, w)
        state, context = self.enter(first).split([self.state, self.context], 1)
        state, context = torch.tanh(state), torch.relu(context)
        flow = torch.zeros(b, 2, h, w)
        for _ in range(3):
            near, known = F.relu(self.near(products)), F.relu(self.flow(flow))
            motion = torch.cat([F.relu(self.motion(torch.cat([near, known], 1))), flow], 1)
            state = self.unit(state, torch.cat([context, motion], 1))
            flow = flow + self.head(state)
        return flow


class Lstm(nn.Module):
    """nn.LSTM: two layers, both directions; all outputs and the last state are read."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 9)
        self.lstm = nn.LSTM(9, 11, num_layers=2, bidirectional=True, batch_first=True)
        self.head, self.state = nn.Linear(22, 7), nn.Linear(11, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (h, c) = self.lstm(self.enter(x))
        return self.head(y), self.state(h[-1] + torch.tanh(c[0]))


class Gru(nn.Module):
    """nn.GRU, time first, then a cell of nn.GRUCell by hand on its summary."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(5, 12, num_layers=2)
        self.cell = nn.GRUCell(12, 8)
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        y, h = self.gru(x)
        state = torch.zeros(x.shape[1], 8)
        for step in (y[0], y.mean(0), h[1]):
            state = self.cell(step, state)
        return self.head(state)


class Elman(nn.Module):
    """nn.RNN with relu, and an LSTM with a projection's worth of proportions: one layer, no bias, a given state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.lstm = nn.RNN(5, 9, nonlinearity="relu", batch_first=True), nn.LSTM(9, 7, bias=False)
        self.start, self.cell = nn.Parameter(torch.randn(1, 1, 7)), nn.LSTMCell(7, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        start = self.start.expand(-1, x.shape[0], -1).contiguous()
        y, (h, _) = self.lstm(y.transpose(0, 1), (start, torch.zeros_like(start)))
        state, memory = self.cell(h[0])
        return self.head(self.cell(y[2], (state, memory))[0])


class Mixture(nn.Module):
    """Experts in stacked weights; each token is a weighted sum of its best two.

    `gather` picks each token's weights by index; else all experts run and what was not chosen counts nothing.
    """

    def __init__(self, gather: bool, dim: int = 20, hidden: int = 26, experts: int = 5, chosen: int = 2) -> None:
        super().__init__()
        self.gather, self.chosen = gather, chosen
        self.enter, self.norm = nn.Linear(9, dim), nn.LayerNorm(dim)
        self.router = nn.Linear(dim, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, dim, 2 * hidden) / dim**0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, dim) / hidden**0.5)
        self.head = nn.Linear(dim, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = self.norm(x).flatten(0, 1)
        scores = self.router(y).softmax(-1)
        weights, places = scores.topk(self.chosen, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.gather:
            gate, up = torch.einsum("td,tkdf->tkf", y, self.up[places]).chunk(2, -1)
            each = torch.einsum("tkf,tkfd->tkd", F.silu(gate) * up, self.down[places])
            y = (each * weights[..., None]).sum(1)
        else:
            full = torch.zeros_like(scores).scatter(1, places, weights)
            gate, up = torch.einsum("td,edf->tef", y, self.up).chunk(2, -1)
            y = torch.einsum("tef,efd,te->td", F.silu(gate) * up, self.down, full)
        return self.head(x + y.view_as(x))


class Mamba(nn.Module):
    """A selective scan (arXiv:2312.00752), step by step in Python, between a causal convolution and a gate."""

    def __init__(self, dim: int = 14, inner: int = 22, state: int = 6, rank: int = 3) -> None:
        super().__init__()
        self.inner, self.state, self.rank = inner, state, rank
        self.embed, self.norm = nn.Embedding(40, dim), nn.LayerNorm(dim)
        self.enter = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.select, self.step = nn.Linear(inner, rank + 2 * state, bias=False), nn.Linear(rank, inner)
        self.rates = nn.Parameter(torch.arange(1, state + 1).float().repeat(inner, 1).log())
        self.skip = nn.Parameter(torch.randn(inner))
        self.out = nn.Linear(inner, dim, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        first = self.embed(input_ids)
        n = first.shape[1]
        x, gate = self.enter(self.norm(first)).chunk(2, -1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., :n]).transpose(1, 2)
        rank, read, write = self.select(x).split([self.rank, self.state, self.state], -1)
        step = F.softplus(self.step(rank))
        decay = torch.exp(step[..., None] * -self.rates.exp())
        drive = (step * x)[..., None] * read[:, :, None]
        h = torch.zeros(x.shape[0], self.inner, self.state)
        ys = []
        for t in range(n):
            h = decay[:, t] * h + drive[:, t]
            ys.append((h * write[:, t, None]).sum(-1))
        y = torch.stack(ys, 1) + x * self.skip
        return first + self.out(y * F.silu(gate))
