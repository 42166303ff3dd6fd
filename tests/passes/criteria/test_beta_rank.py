"""`"beta-rank"`: filters by weights and by the spread of data."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.calibration import calibration
from graphopt.errors import BadCalibration
from graphopt.passes import criteria
from tests.passes.criteria.nets import axes_of, axis_of, mlp, residual, samples, score, seeded, settled, stored
from tests.programs import program_of


def loops(weight, bias, x, *, stride=1, padding=0, dilation=1, groups=1, inverse=False):
    """The definition, place by place: mean |f_k| times the sum of spreads, and no scaling."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    filters, inner = weight.shape[0], weight.shape[1]
    found = torch.zeros(filters, dtype=torch.float64)
    for k in range(filters):
        group = k // (filters // groups)
        for u in range(y.shape[2]):
            for v in range(y.shape[3]):
                values = []
                for a in range(weight.shape[2]):
                    for b in range(weight.shape[3]):
                        row, column = u * stride - padding + a * dilation, v * stride - padding + b * dilation
                        if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                            values.append(x[:, group * inner : (group + 1) * inner, row, column].flatten())
                outer, own = y[:, k, u, v].std(), torch.cat(values).std()
                if own > 0 and outer > 0:
                    found[k] += own / outer if inverse else outer / own
        found[k] *= weight[k].abs().mean()
    return found


GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": 2, "dilation": 2},
    {"groups": 2, "padding": 1},
    {"groups": 4, "stride": 2},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("ratio", ["out_over_in", "in_over_out"])
def test_equals_the_loops(geometry, ratio):
    """Without a loop over places it is what the definition gives, with any stride, padding, dilation and groups."""
    conv = settled(nn.Conv2d(4, 8, 3, **geometry))
    last = settled(nn.Conv2d(8, 3, 1), 9)
    axes = axes_of(program_of(lambda s, x: s.last(s.conv(x)), seeded(2, 4, 6, 6), conv=conv, last=last))
    data = samples(axes, 3)
    x = torch.cat([next(iter(batch.values())) for batch in data])
    expected = loops(conv.weight.detach(), conv.bias.detach(), x, **geometry, inverse=ratio == "in_over_out")
    for atom in axes.free("channel"):
        (dim,) = (d for n, d in ((n.name, d) for n, d in axes.dims.items()) if n == "p_conv_weight")
        from graphopt.axes import owner

        items = owner(dim[0], atom)
        if not bool((items >= 0).any()):
            continue
        wanted = torch.zeros(atom.extent, dtype=torch.float64).index_add(0, items, expected)
        torch.testing.assert_close(score("beta-rank", axes, atom, data, ratio=ratio, scaled=False), wanted)


def net(scale=1.0, shift=0.0, constant=None):
    """A convolution whose filter 2 is scaled, whose bias is shifted, or one of whose filters gives a constant."""
    conv, last = settled(nn.Conv2d(3, 5, 3)), settled(nn.Conv2d(5, 2, 1), 9)
    conv.weight.data[2] *= scale
    conv.bias.data[2] *= scale
    conv.bias.data += shift
    if constant is not None:
        conv.weight.data[constant] = 0
    return axes_of(program_of(lambda s, x: s.last(s.conv(x)), seeded(2, 3, 5, 5), conv=conv, last=last))


def scored(axes, data=None, **options):
    return score("beta-rank", axes, axis_of(axes, "conv.weight"), data or samples(axes), scaled=False, **options)


def test_scaling_a_filter():
    """Twice in the code's form, by its weights and by its output's spread; not at all in the paper's."""
    torch.testing.assert_close(scored(net(3.0))[2], 9 * scored(net())[2])
    torch.testing.assert_close(scored(net(3.0), ratio="in_over_out")[2], scored(net(), ratio="in_over_out")[2])


def test_order_of_samples_and_constants_do_not_count():
    """Spreads know neither."""
    axes = net()
    data = samples(axes)
    back = calibration([dict(batch) for batch in data[::-1]], axes.program)
    torch.testing.assert_close(scored(axes, data), scored(axes, back))
    torch.testing.assert_close(scored(axes, data), scored(net(shift=5.0), data))


@pytest.mark.parametrize("ratio", ["out_over_in", "in_over_out"])
def test_a_constant_filter_scores_nothing(ratio):
    """No spread, no score."""
    assert float(scored(net(constant=1), ratio=ratio)[1]) == 0
    assert int((scored(net(constant=1), ratio=ratio) == 0).sum()) == 1


def test_residual_partners_add_up_after_scaling():
    """Each layer is brought to [0, 1] first."""
    axes = residual()
    data = samples(axes)
    atom = axis_of(axes, "stem.weight")
    got = score("beta-rank", axes, atom, data)
    parts = []
    x = torch.cat([next(iter(batch.values())) for batch in data])
    stem = loops(stored(axes, "stem.weight"), stored(axes, "stem.bias"), x, padding=1)
    y = F.conv2d(x, stored(axes, "stem.weight"), stored(axes, "stem.bias"), padding=1)
    y = F.batch_norm(y, *(stored(axes, f"norm.{n}") for n in ("running_mean", "running_var", "weight", "bias")))
    z = F.conv2d(y, stored(axes, "inner.weight"), stored(axes, "inner.bias"))
    z = F.batch_norm(z, *(stored(axes, f"norm1.{n}") for n in ("running_mean", "running_var", "weight", "bias")))
    outer = loops(stored(axes, "outer.weight"), stored(axes, "outer.bias"), F.relu(z), padding=1)
    for part in (stem, outer):
        parts.append((part - part.min()) / (part.max() - part.min()))
    torch.testing.assert_close(got, parts[0] + parts[1])


def test_linear_layers_are_convolutions_of_one_tap():
    """Their samples are what the first dimension has."""
    axes = mlp()
    data = samples(axes)
    x = torch.cat([next(iter(batch.values())) for batch in data])[:, :, None, None]
    expected = loops(stored(axes, "one.weight")[:, :, None, None], stored(axes, "one.bias"), x)
    torch.testing.assert_close(score("beta-rank", axes, axis_of(axes, "one.weight"), data, scaled=False), expected)


def test_one_sample_has_no_spread():
    """It is refused, rather than scored zero."""
    conv, last = settled(nn.Conv2d(3, 5, 3)), settled(nn.Conv2d(5, 2, 1), 9)
    axes = axes_of(program_of(lambda s, x: s.last(s.conv(x)), seeded(1, 3, 5, 5), conv=conv, last=last))
    with pytest.raises(BadCalibration, match="two samples"):
        criteria.make("beta-rank").scores(axes, axes.free(), samples(axes, 1))


def test_it_ranks_filters_whose_inputs_are_dead():
    """A large filter on an input that never changes is last, though by its weights it is first."""
    conv, last = settled(nn.Conv2d(3, 5, 1)), settled(nn.Conv2d(5, 2, 1), 9)
    conv.weight.data[4] = 0
    conv.weight.data[4, 2] = 10
    axes = axes_of(program_of(lambda s, x: s.last(s.conv(x)), seeded(2, 3, 5, 5), conv=conv, last=last))
    batches = [seeded(2, 3, 5, 5, seed=n) for n in range(4)]
    for batch in batches:
        batch[:, 2] = 0.3
    data = calibration(batches, axes.program)
    atom = axis_of(axes, "conv.weight")
    assert int(score("beta-rank", axes, atom, data).argmin()) == 4
    assert int(score("l1", axes, atom).argmax()) == 4
