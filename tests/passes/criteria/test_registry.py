"""Every registered criterion: its names agree, it has a test, and it keeps what a criterion promises."""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache
from pathlib import Path

import pytest
import torch

from graphopt.axes import infer
from graphopt.passes import criteria
from graphopt.passes.criteria.base import Criterion
from graphopt.shrink import shrink
from tests.passes.criteria.nets import NETS, mlp, residual, residual_of, samples, seeded, stored

EVERY = [name for name in criteria.CRITERIA if name != "snr"]  # which refuses what is not Bayesian


@pytest.mark.parametrize("name", criteria.CRITERIA)
def test_names_class_test_and_documentation_agree(name):
    """The table's name is the class's, options have defaults, its file has a test, its docstring says what it is."""
    kind = criteria.load(name)
    assert issubclass(kind, Criterion)
    assert kind.name == name
    assert kind.__name__ == "".join(part.capitalize() for part in name.split("-"))
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    module = criteria.CRITERIA[name].partition(":")[0].rpartition(".")[2]
    test = Path(__file__).parent / f"test_{module}.py"
    assert f'"{name}"' in test.read_text()
    text = inspect.getdoc(kind)
    assert text
    assert name == "random" or (("score_" in text or "snr" in text) and "Source:" in text and "Differs" in text)
    for field in dataclasses.fields(kind):
        assert f"{field.name}" in text or name in ("l2", "random"), f"{name}: {field.name} is not documented"
    assert criteria.make(name) == kind()


def test_every_file_is_registered_or_helps():
    """No criterion lies about that the table does not know."""
    files = {path.stem for path in Path(inspect.getfile(criteria)).parent.glob("*.py")}
    known = {path.partition(":")[0].rpartition(".")[2] for path in criteria.CRITERIA.values()}
    assert files - known == {"__init__", "base", "uses", "trajectory"}


def test_unknown_names_and_options():
    """Unknown names are KeyErrors, unknown options TypeErrors."""
    with pytest.raises(KeyError):
        criteria.make("l3")
    with pytest.raises(TypeError):
        criteria.make("l1", power=3)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", EVERY)
def test_scores_are_finite_and_complete(name, net):
    """Every free axis gets one finite float64 number for each item, whichever axes are asked for with it."""
    axes = NETS[net]()
    free = axes.free()
    assert free
    data = samples(axes)
    found = criteria.make(name).scores(axes, free, data)
    assert list(found) == list(free) or set(found) == set(free)
    for atom, scores in found.items():
        assert scores.shape == (atom.extent,)
        assert scores.dtype is torch.float64
        assert bool(scores.isfinite().all())
        assert bool((scores >= 0).all())
    fallbacks = criteria.make(name).fallbacks(axes, free)
    if name != "optin" and not fallbacks:
        alone = criteria.make(name).scores(axes, free[-1:], data)
        torch.testing.assert_close(alone[free[-1]], found[free[-1]])


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", [name for name in EVERY if name != "random"])
def test_scores_move_with_the_items(name, net):
    """Where axes are re-ordered, which changes nothing, their scores are re-ordered alike."""
    axes = NETS[net]()
    data = samples(axes)
    before = {atom.label: scores for atom, scores in criteria.make(name).scores(axes, axes.free(), data).items()}
    moved, orders = reordered(net)
    after = criteria.make(name).scores(moved, moved.free(), data)
    assert {atom.label for atom in after} == set(before)
    for atom, scores in after.items():
        torch.testing.assert_close(scores, before[atom.label][orders[atom.label]], rtol=1e-6, atol=1e-9)


@cache
def reordered(net):
    """A net with all its axes re-ordered, and how."""
    axes = NETS[net]()
    orders = {
        atom: torch.randperm(atom.extent, generator=torch.Generator().manual_seed(place))
        for place, atom in enumerate(axes.free())
    }
    return infer(shrink(axes, orders)), {atom.label: order for atom, order in orders.items()}


def dead(kind):
    """The residual net with channel 3 of its inner axis dead: nothing takes it up, or nothing is in it."""
    axes = residual()
    if kind == "outgoing":
        weight = stored(axes, "outer.weight").clone()
        weight[:, 3] = 0
        return residual_of(outer_weight=weight)
    scale, shift = stored(axes, "norm1.weight").clone(), stored(axes, "norm1.bias").clone()
    scale[3] = shift[3] = 0
    return residual_of(norm1_weight=scale, norm1_bias=shift)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[(name, "outgoing") for name in ("wanda", "optin", "taylor", "hessian")],
        *[(name, "incoming") for name in ("wanda", "optin", "taylor", "hessian", "bn-scale", "activation")],
    ],
)
def test_dead_units_come_first(name, kind):
    """A unit without effect has a score of zero, and no other has."""
    from tests.passes.criteria.nets import axis_of

    axes = dead(kind)
    atom = axis_of(axes, "inner.weight")
    scores = criteria.make(name).scores(axes, [atom], samples(axes))[atom]
    assert int(scores.argmin()) == 3
    assert float(scores[3]) <= 1e-12 * float(scores.max())
    assert float(scores.sort().values[1]) > 1e-6 * float(scores.max())


@pytest.mark.parametrize("name", [n for n in EVERY if criteria.load(n).needs_calibration])
def test_example_inputs_serve_without_data(name):
    """Where no data is given the program's example inputs are taken."""
    axes = mlp()
    found = criteria.make(name).scores(axes, axes.free(), None)
    assert set(found) == set(axes.free())
    assert bool(torch.cat(list(found.values())).isfinite().all())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("l1", {"reduce": "median"}),
        ("l1", {"normalise": "median"}),
        ("wanda", {"ends": "left"}),
        ("activation", {"measure": "max"}),
        ("hessian", {"normalise": "x"}),
        ("beta-rank", {"ratio": "x"}),
        ("geometric-median", {"ends": "x"}),
        ("optin", {"samples": 0}),
    ],
)
def test_unknown_choices_are_refused(name, options):
    """An option that is none of the known words is the user's error, and says which are known."""
    from graphopt.errors import BadOption

    axes = mlp()
    with pytest.raises(BadOption):
        criteria.make(name, **options).scores(axes, axes.free(), samples(axes))


def test_time_is_linear_in_axes():
    """A program of many layers takes about as long for each as one of few: no work is repeated for every axis."""
    import time

    from torch import nn

    from tests.passes.criteria.nets import axes_of
    from tests.programs import program_of

    def seconds(depth: int) -> float:
        layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(depth)]).double()
        axes = axes_of(program_of(lambda s, x: s.layers(x), seeded(2, 8), layers=layers))
        data = samples(axes)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            for name in EVERY:
                if name != "optin":
                    criteria.make(name).scores(axes, axes.free(), data)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(80) < 4 * 2 * seconds(20) + 0.2
