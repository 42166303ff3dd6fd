"""Recipes and --pass texts become passes with options of the right kind, or one clear error."""

from __future__ import annotations

import pytest

from graphopt.budget import Budget
from graphopt.errors import BadRecipe, UnknownPass
from graphopt.optimize import plan
from graphopt.passes import make
from graphopt.passes.cut_and_sparsify import CutAndSparsify
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
        ("latency", "nan", None),
        ("latency", "-3ms", None),
        ("flops", "1", Budget("flops", 1.0)),
        ("flops", "5000", Budget("flops", 5000.0, absolute=True)),
        ("flops", "1.5", None),
        ("params", "100", None),
        ("flops", "999", None),
        ("flops", "1e400", None),
        ("flops", "1e400G", None),
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


def test_amounts_without_a_unit_are_taken_for_slips():
    """1.5 is neither a share nor what anybody means by an amount; the hint shows both forms."""
    with pytest.raises(
        BadRecipe, match=r"--flops 1\.5: is neither a share, which is at most 1, nor an amount"
    ) as caught:
        parse_budget("flops", "1.5")
    assert "--flops 0.5" in caught.value.way_out
    assert "--flops 1.5G" in caught.value.way_out


@pytest.mark.parametrize(
    ("share", "shown"), [(0.41, "0.41"), (0.4123, "0.413"), (0.0001, "0.0001"), (3.21e-7, "3.21e-07")]
)
def test_shares_are_shown_with_three_digits(share: float, shown: str):
    """Rounded up, however small they are: what is shown can be asked for."""
    assert Budget("flops", share).show(share * 1e9, 1e9) == shown
    assert float(shown) >= share


def test_round_to_is_step():
    """A file may call the option as the command line does; both at once are refused."""
    assert parse_step("prune:round-to=8") == Step("prune", {"step": "8"})


def test_round_to_in_a_file(tmp_path):
    """For all passes, and for one."""
    file = tmp_path / "round.toml"
    file.write_text('round-to = 32\nkeep = 0.5\n[[pass]]\nname = "prune"\n[[pass]]\nname = "nvit"\nround_to = 16\n')
    first, second = passes_of(read(file))
    assert (first.step, second.step) == (32, 16)
    file.write_text('round-to = 32\nstep = 8\n[[pass]]\nname = "prune"\nkeep = 0.5\n')
    with pytest.raises(BadRecipe, match="one option twice"):
        read(file)


def test_passes_of_the_command_line_come_behind_those_of_the_file(tmp_path):
    """A recipe and passes: one after the other, and options that are given hold for all."""
    file = tmp_path / "first.toml"
    file.write_text('criterion = "l1"\n[[pass]]\nname = "prune-neurons"\nkeep = 0.5\n')
    both = plan(["prune-heads:keep=0.7"], file, {"criterion": "random"})
    first, second = passes_of(both)
    assert (first.name, first.keep, first.criterion) == ("prune-neurons", 0.5, "random")
    assert (second.name, second.keep, second.criterion) == ("prune-heads", 0.7, "random")
    assert plan(["prune-heads:keep=0.7"], read(file), {"criterion": "random"}) == both


def test_a_shared_budget_joins_them(tmp_path):
    """A budget of the file's is for its passes and those of the command line together."""
    file = tmp_path / "half.toml"
    file.write_text('flops = 0.5\n[[pass]]\nname = "prune-neurons"\n')
    (joint,) = passes_of(plan(["prune-heads"], file, {}))
    assert joint == make("prune", axes=("neuron", "head"), budget=Budget("flops", 0.5))
    (joint,) = passes_of(plan(["prune:axes=channel|neuron"], file, {}))
    assert joint == make("prune", axes=("neuron", "channel"), budget=Budget("flops", 0.5))


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


def test_zeros_share_a_budget_with_cuts():
    """One pass that sets weights to zero, behind what shrinks: jointly, with the share that the cut is given."""
    budget = Budget("flops", 0.3)
    steps = [parse_step(text) for text in ("prune-neurons:share=60%", "prune-heads", "sparsify-blocks:format=8x1")]
    (joint,) = passes_of(Recipe(tuple(steps), {"flops": 0.3}))
    cut = make("prune", axes=("neuron", "head"), budget=budget)
    zeros = make("sparsify-blocks", format="8x1", budget=budget)
    assert joint == CutAndSparsify(cut, zeros, budget, 0.6)
    (plain,) = passes_of(Recipe((Step("prune-channels", {}), Step("sparsify-blocks", {})), {"flops": 0.3}))
    assert plain.share is None
    # A budget of its own is none that is shared.
    first, second = passes_of(
        Recipe((Step("prune-channels", {"flops": 0.6}), Step("sparsify-blocks", {})), {"macs": 0.5})
    )
    assert (first.budget, second.budget) == (Budget("flops", 0.6), Budget("macs", 0.5))


@pytest.mark.parametrize(
    ("passes", "says", "way_out"),
    [
        (
            ["sparsify-blocks", "prune-channels"],
            "name what shrinks in front",
            "--pass sparsify-blocks:flops=0.5 --pass prune-channels:flops=0.5",
        ),
        (
            ["prune-channels", "sparsify-blocks", "sparsify-wanda"],
            "cannot be cut together",
            "--pass prune-channels:flops=0.63 --pass sparsify-blocks:flops=0.63 --pass sparsify-wanda:flops=0.63",
        ),
        (
            ["factor-low-rank", "prune-channels"],
            "cannot be cut together",
            "--pass factor-low-rank:flops=0.5 --pass prune-channels:flops=0.5",
        ),
        (["prune-channels", "sparsify-nm:format=2:4"], "keeps 2:4 whatever", "--pass prune-channels:flops=0.6"),
        (["prune-channels:share=0.5"], "share is that of a budget", "flops=0.6"),
        (["prune-channels:share=2", "sparsify-blocks"], "share=2 is no share", "above 0"),
        (["prune-channels:share=x", "sparsify-blocks"], "share=x is no share", "above 0"),
        (["prune-heads:share=0.5", "prune-neurons:share=0.6", "sparsify-blocks"], "one share, not 0.5, 0.6", "once"),
        (["sparsify-blocks:share=0.5", "prune-channels"], "no option share", "it has"),
    ],
)
def test_budgets_that_cannot_be_shared(passes, says, way_out):
    """The error says how to write a budget for each, with numbers that come to the same."""
    with pytest.raises(BadRecipe, match=says) as caught:
        passes_of(Recipe(tuple(map(parse_step, passes)), {"flops": 0.25}))
    assert way_out in caught.value.way_out


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
