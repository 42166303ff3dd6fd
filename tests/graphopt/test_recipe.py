"""Recipes and --pass texts become passes with options of the right kind, or one clear error."""

from __future__ import annotations

import pytest

from graphopt.budget import Budget
from graphopt.errors import BadRecipe, UnknownPass
from graphopt.passes import make
from graphopt.recipe import Recipe, Step, parse_budget, parse_step, passes_of, read


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        ("flops", "0.5", Budget("flops", 0.5)),
        ("flops", 0.5, Budget("flops", 0.5)),
        ("params", "50%", Budget("params", 0.5)),
        ("params", "150%", None),
        ("flops", "1.2G", Budget("flops", 1.2e9, absolute=True)),
        ("macs", "300m", Budget("macs", 3e8, absolute=True)),
        ("bytes", "10MB", Budget("bytes", 1e7, absolute=True)),
        ("latency", "8ms", Budget("latency", 0.008, absolute=True)),
        ("latency", "0.5", Budget("latency", 0.5)),
        ("latency", "8", None),
        ("flops", "8ms", None),
        ("flops", "0", None),
        ("flops", "-1", None),
        ("flops", "half", None),
    ],
)
def test_amounts(kind: str, text: object, wanted: Budget | None):
    """A number up to 1 or a percentage is a share, a number with a unit an amount; anything else is refused."""
    if wanted is None:
        with pytest.raises(BadRecipe):
            parse_budget(kind, text)
    else:
        assert parse_budget(kind, text) == wanted


def test_pass_with_options_on_the_command_line():
    """--pass NAME:option=value,option=value gives the pass its options, with dashes or underscores."""
    step = parse_step("prune-channels:criterion=l1,min-keep=0.1,keep=0.5")
    assert step == Step("prune-channels", {"criterion": "l1", "min_keep": "0.1", "keep": "0.5"})
    (made,) = passes_of(Recipe((step,), {}))
    assert made == make("prune-channels", criterion="l1", min_keep=0.1, keep=0.5)


def test_shared_options_yield_to_a_step_s_own():
    """What stands above the passes holds for all that have it; what a pass says itself comes first."""
    steps = (Step("prune-channels", {"criterion": "l1", "keep": 0.5}), Step("prune-neurons", {"keep": 0.7}))
    first, second = passes_of(Recipe(steps, {"criterion": "random", "min_keep": 0.2}))
    assert (first.criterion, second.criterion) == ("l1", "random")
    assert (first.min_keep, second.min_keep) == (0.2, 0.2)
    assert first.budget is second.budget is None


def test_one_budget_for_several_passes_is_spent_jointly():
    """Passes that share a budget become one that cuts all their axes: the first of them would use it up otherwise."""
    steps = (Step("prune-neurons", {}), Step("prune-heads", {}))
    (joint,) = passes_of(Recipe(steps, {"flops": 0.5, "criterion": "l1"}))
    assert joint == make("prune", axes=("neuron", "head"), budget=Budget("flops", 0.5), criterion="l1")


def test_one_budget_for_passes_that_cannot_cut_together():
    """A shared budget for passes with other options each is refused, and the way out is named."""
    steps = (Step("prune-neurons", {"criterion": "l1"}), Step("prune-heads", {}))
    with pytest.raises(BadRecipe, match="cannot be cut together"):
        passes_of(Recipe(steps, {"flops": 0.5}))


def test_recipe_file(tmp_path):
    """A TOML file with a table a pass is the same as the flags."""
    file = tmp_path / "half.toml"
    file.write_text('criterion = "l1"\nflops = 0.5\n[[pass]]\nname = "prune-channels"\ninclude = ["layer1.*"]\n')
    assert read(file) == Recipe(
        (Step("prune-channels", {"include": ["layer1.*"]}),), {"criterion": "l1", "flops": 0.5}, "half"
    )
    (made,) = passes_of(read(file))
    assert made == make("prune-channels", criterion="l1", include=("layer1.*",), budget=Budget("flops", 0.5))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no passes"),
        ("[[pass]]\ncriterion = 'l1'\n", "no name"),
        ("[[pass]\n", "no TOML"),
        ("pass = 3\n", "no passes"),
    ],
)
def test_bad_recipe_files(tmp_path, text: str, says: str):
    """A file that is no recipe is refused with what is wrong with it."""
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(BadRecipe, match=says):
        read(file)


def test_missing_recipe_file(tmp_path):
    """A file that is not there is named."""
    with pytest.raises(BadRecipe, match=r"nowhere\.toml"):
        read(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("step", "error", "says"),
    [
        (Step("prune-chanels", {}), UnknownPass, "did you mean prune-channels"),
        (Step("prune-channels", {"critrion": "l1"}), BadRecipe, "did you mean criterion"),
        (Step("prune-channels", {"keep": "much"}), BadRecipe, "it takes"),
        (Step("prune-channels", {"flops": 0.5, "params": 0.5}), BadRecipe, "two budgets"),
    ],
)
def test_wrong_steps(step: Step, error: type[Exception], says: str):
    """A pass or option that does not exist, or a value of the wrong kind, is refused with what would be right."""
    with pytest.raises(error) as caught:
        passes_of(Recipe((step,), {}))
    assert says in str(caught.value)
    assert caught.value.exit == 2


def test_option_that_no_pass_has():
    """A shared option that none of the passes takes is refused, not ignored."""
    with pytest.raises(BadRecipe, match="colour"):
        passes_of(Recipe((Step("prune-channels", {}),), {"colour": "red"}))
