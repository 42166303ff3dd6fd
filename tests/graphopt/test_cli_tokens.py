"""Token reduction from the command line: optimize, compile, passes and explain, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from graphopt.bundle import Bundle
from tests.token_models import Dit, random
from tests.transformer_nets import Encoder, VisionTransformer

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vit.pt2: 16 patches, three blocks; dit.pt2: as many, of a latent; cnn.pt2 without attention; x.png."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("tokens")
    module = VisionTransformer(dim=16, heads=2, layers=3, image=16, patch=4, classes=3).eval()
    torch.export.save(torch.export.export(module, (torch.rand(1, 3, 16, 16),)), place / "vit.pt2")
    dit = random(Dit(layers=4, channels=4)).eval()
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([1.7]), torch.tensor([2]))
    torch.export.save(torch.export.export(dit, inputs), place / "dit.pt2")
    cnn = torch.nn.Conv2d(3, 4, 3).eval()
    torch.export.save(torch.export.export(cnn, (torch.rand(1, 3, 8, 8),)), place / "cnn.pt2")
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)
    Image.fromarray(pixels).save(place / "x.png")
    return place


def places(out: str) -> list[int]:
    """Counts behind each place, of all passes in the JSON."""
    return [row["kept"] for record in json.loads(out)["records"] for row in record["details"] if "kept" in row]


DRY = ("--dry-run", "--no-measure", "--json")


def test_a_budget_is_met(cli: Cli, folder: Path) -> None:
    """Tokens fall from place to place, and the report says how."""
    code, out, err = cli("optimize", folder / "vit.pt2", "--pass", "merge-tokens", "--flops", "0.6", *DRY)
    assert code == 0, err
    counts = places(out)
    assert 16 > counts[0] > counts[-1]
    assert json.loads(out)["after"]["flops"] <= 0.6 * json.loads(out)["before"]["flops"]
    code, out, _ = cli("optimize", folder / "vit.pt2", "--pass", "merge-tokens", "--flops", "0.6", *DRY[:2])
    assert "tokens: 16, then " + ", ".join(f"{n} behind blocks.{b}" for b, n in enumerate(counts)) in out


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ("counts=12,9,8", [12, 9, 8]),
        ("counts=(12;9;8)", [12, 9, 8]),
        ("counts=12,10,sites=0,2,tokens=1:", [12, 10]),
        ("counts=12,sites=1,score=pagerank:steps=2;sharpness=3.0,reducer=top-k", [12]),
        ("keep=0.5,schedule=last,score=random:seed=3,reducer=top-k", [8]),
        ("keep=0.5,schedule=ratio,reducer=transform:tau=0.2;hard-self=false", [12, 10, 8]),
    ],
)
def test_options(cli: Cli, folder: Path, options: str, counts: list[int]) -> None:
    """Lists of numbers with plain commas; options of scores and reducers behind their names."""
    code, out, err = cli("optimize", folder / "vit.pt2", "--pass", f"merge-tokens:{options}", *DRY)
    assert code == 0, err
    assert places(out) == counts


def test_a_recipe_with_another_pass(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """Each pass with a budget of its own; the later one keeps what the first was allowed."""
    file = tmp_path / "recipe.toml"
    file.write_text(
        '[[pass]]\nname = "prune-neurons"\nflops = 0.8\n'
        '[[pass]]\nname = "merge-tokens"\nflops = 0.7\nsites = [0, 1]\nschedule = "constant"\n'
    )
    code, out, err = cli("optimize", folder / "vit.pt2", "--recipe", file, *DRY)
    assert code == 0, err
    assert [record["name"] for record in json.loads(out)["records"]] == ["prune-neurons", "merge-tokens"]
    assert len(places(out)) == 2
    assert json.loads(out)["after"]["flops"] <= 0.57 * json.loads(out)["before"]["flops"]
    code, _, err = cli(
        "optimize", folder / "vit.pt2", "--pass", "prune-neurons", "--pass", "merge-tokens", "--flops", "0.6"
    )
    assert code == 2
    assert "give each pass a budget of its own" in err


def test_the_hint_for_two_passes_can_be_followed(cli: Cli, folder: Path) -> None:
    """Passes that reduce tokens take turns; the second counts the model's blocks, and stays behind the first."""
    both = ("optimize", folder / "vit.pt2", "--pass", "merge-tokens", "--pass", "prune-tokens", "--flops", "0.7", *DRY)
    code, _, err = cli(*both)
    assert code == 2
    hint = err.partition("a share of what it finds: ")[2].split()
    assert hint == ["--pass", "merge-tokens:flops=0.837,sites=0", "--pass", "prune-tokens:flops=0.837"]
    code, out, err = cli("optimize", folder / "vit.pt2", *hint, *DRY)
    assert code == 0, err
    first, second = ([row for row in each["details"] if "kept" in row] for each in json.loads(out)["records"])
    assert [row["name"] for row in first] == ["blocks.0"]
    assert {row["name"] for row in second} <= {"blocks.1", "blocks.2"}
    assert json.loads(out)["after"]["flops"] <= 0.7 * json.loads(out)["before"]["flops"]


@pytest.mark.parametrize(("step", "kind"), [("merge-tokens", "flops"), ("prune-tokens", "latency")])
def test_the_least_that_is_reachable_is_reached(cli: Cli, folder: Path, step: str, kind: str) -> None:
    """What the refusal says can be asked for: it counts what choosing and merging take."""
    command = ("optimize", folder / "vit.pt2", "--pass", step, f"--{kind}")
    code, _, err = cli(*command, "0.01", *DRY[:2])
    assert code == 2
    least = err.partition("the least reachable is ")[2].split()[0]
    code, _, err = cli(*command, least, *DRY)
    assert code == 0, err


def test_a_budget_of_latency_is_met(cli: Cli, folder: Path) -> None:
    """As estimated for the target, with what choosing and merging takes."""
    command = ("optimize", folder / "dit.pt2", "--pass", "prune-tokens:score=norm", "--latency", "0.9")
    code, out, err = cli(*command, *DRY)
    assert code == 0, err
    latency = json.loads(out)["latency_seconds"]["estimated"]
    assert latency["after"] <= 0.9 * latency["before"]
    code, _, err = cli(*command[:-1], "0.01", *DRY[:2])
    assert code == 2
    assert "prune-tokens cannot meet --latency 0.01; the least reachable is" in err


def test_what_gets_all_tokens_is_said_once(cli: Cli, tmp_path: Path) -> None:
    """Each call with its own reason, however many places there are in front of it."""
    torch.manual_seed(0)
    module = Encoder(dim=16, heads=2, layers=3, sequence=16, words=20).eval()
    inputs = (torch.arange(16)[None], torch.ones(1, 16, dtype=torch.int64))
    torch.export.save(torch.export.export(module, inputs), tmp_path / "text.pt2")
    step = "prune-tokens:counts=14,12,10"
    code, out, err = cli("optimize", tmp_path / "text.pt2", "--pass", step, *DRY)
    assert code == 0, err
    where = [row["where"] for record in json.loads(out)["records"] for row in record["declined"]]
    assert where
    assert len(where) == len(set(where))


def test_a_flag_that_no_pass_takes_is_named_as_it_was_typed(cli: Cli, folder: Path) -> None:
    """--round-to is called step in passes, which the user need not know."""
    code, _, err = cli("optimize", folder / "vit.pt2", "--pass", "merge-tokens:keep=0.5", "--round-to", "8", *DRY[:2])
    assert code == 2
    assert "--round-to: merge-tokens has no such option" in err


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("vit", ":flops=0.01", "the least reachable is 0."),
        ("vit", ":flops=0.3", "or try schedule=last, prune-tokens (bipartite takes at most half"),
        ("vit", ":flops=0.3,sites=1,until=2", "or try a later until than 2, more or earlier sites, prune-tokens"),
        ("vit", ":flops=0.3", "merge-tokens cannot meet --flops 0.3; the least reachable is"),
        ("vit", ":flops=0.01,sites=1", "of it runs in front of the first place or beside the stream"),
        ("vit", ":params=0.5", "takes no budget of params\n  hint: give --flops, --macs or --latency"),
        ("cnn", ":flops=0.5", "finds nothing to cut: there is no attention"),
        ("vit", "", "one of budget, keep and counts"),
        ("vit", ":keep=0.5,flops=0.5", "one of budget, keep and counts"),
        ("vit", ":counts=12,10", "2 counts for 3 places"),
        ("vit", ":counts=20,10,8", "counts=20,10,8 of 16 tokens: 20 is more than 16"),
        ("vit", ":counts=10,8,0", "one token stays at least"),
        ("vit", ":counts=50.5", "it takes whole numbers with commas"),
        ("vit", ":counts=8,10,8", "give counts that fall"),
        ("vit", ":counts=3,2,1", "bipartite leaves at least 8"),
        ("vit", ":keep=0.5,sites=7", "blocks are 0 to 2"),
        ("vit", ":keep=0.5,tokens=1:99", "tokens=1:99 of 17"),
        ("vit", ":keep=0.5,reducer=top-k,score=class-atention", "did you mean class-attention?"),
        ("vit", ":keep=0.5,reducer=bipartit", "did you mean bipartite?"),
        ("vit", ":keep=0.5,schedule=linaer", "did you mean linear?"),
        ("vit", ":keep=0.5,reducer=top-k,score=pagerank:stps=3", "no option stps\n  hint: did you mean steps?"),
    ],
)
def test_what_is_refused(cli: Cli, folder: Path, model: str, options: str, says: str) -> None:
    """With what was wrong, and the nearest name."""
    code, _, err = cli("optimize", folder / f"{model}.pt2", "--pass", f"merge-tokens{options}", *DRY[:2])
    assert code == 2
    assert says in err


def test_passes_explains_what_reductions_are_made_of(cli: Cli) -> None:
    """Scores, reducers and schedules stand in the list, and each is explained with its paper."""
    entries = json.loads(cli("passes", "--json")[1])["passes"]
    kinds = {entry["name"]: entry["kind"] for entry in entries}
    for name, kind in (("class-attention", "score"), ("bipartite", "reducer"), ("linear", "schedule")):
        assert kinds[name] == f"{kind} of tokens"
        assert "arXiv:" in cli("passes", name)[1]
    shown = cli("passes", "merge-tokens")[1]
    assert "arXiv:2210.09461" in shown
    assert "counts: tuple[int, ...] | None = None" in shown


def test_explain_draws_tokens_of_a_model(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """A .pt2 that optimize wrote needs nothing else."""
    small = tmp_path / "small.pt2"
    options = "counts=12,9,sites=0,2"
    assert cli("optimize", folder / "vit.pt2", "--pass", f"merge-tokens:{options}", "--no-measure", "-o", small)[0] == 0
    drawn = tmp_path / "tokens.png"
    command = ("explain", "tokens", small, "--image", folder / "x.png", "-o", drawn, "--mean", "0.5", "--std", "0.5")
    code, out, err = cli(*command)
    assert code == 0, err
    assert "behind blocks.0: 12 of 16 tokens\nbehind blocks.2: 9 of 16 tokens\n" in out
    assert Image.open(drawn).width > 300
    found = json.loads(cli(*command, "--json")[1])["places"]
    assert [len(set(row["part_of"])) for row in found] == [12, 9]


def test_the_input_is_in_front_of_the_first_block(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """Both where it is said what was done, and where it is drawn."""
    small = tmp_path / "small.pt2"
    step = "merge-tokens:counts=9,where=input,reducer=bipartite:features=true"
    code, out, err = cli("optimize", folder / "vit.pt2", "--pass", step, "--no-measure", "-o", small)
    assert code == 0, err
    assert "tokens: 16, then 9 in front of blocks.0" in out
    out = cli("explain", "tokens", small, "--image", folder / "x.png", "-o", tmp_path / "t.png")[1]
    assert "in front of blocks.0: 9 of 16 tokens" in out


def test_explain_draws_tokens_of_a_bundle(cli: Cli, folder: Path, small_bundle: Bundle, tmp_path: Path) -> None:
    """One compiled with trace=true says the same as the program; another says what to do."""
    step = "prune-tokens:counts=12,9,sites=0,2"
    bundle = tmp_path / "traced.bundle"
    code, _, err = cli("compile", folder / "vit.pt2", "--pass", f"{step},trace=true", "-o", bundle, "--no-verify")
    assert code == 0, err
    small = tmp_path / "small.pt2"
    assert cli("optimize", folder / "vit.pt2", "--pass", step, "--no-measure", "-o", small)[0] == 0
    rest = ("--image", folder / "x.png", "-o", tmp_path / "t.png")
    results = [cli("explain", "tokens", model, *rest, "--json") for model in (bundle, small)]
    assert [code for code, _, _ in results] == [0, 0], results
    assert json.loads(results[0][1])["places"] == json.loads(results[1][1])["places"]
    code, _, err = cli("explain", "tokens", small_bundle.path, *rest)
    assert code == 2
    assert "trace=true" in err


def test_explain_draws_modules_and_semantic_tokens(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """Passes that cut on their own; latents are no image, so the model runs on its examples."""
    step = "flexdit:grid=2,poolings=1,modules=1,sparse=1,dense=0"
    small, drawn = tmp_path / "small.pt2", tmp_path / "t.png"
    assert cli("optimize", folder / "dit.pt2", "--pass", step, "--no-measure", "-o", small)[0] == 0
    code, out, err = cli("explain", "tokens", small, "-o", drawn)
    assert code == 0, err
    assert "in front of blocks.1: 4 of 16 tokens" in out
    assert Image.open(drawn).width > 300
    step = "semantic-tokens:count=4,base=0"
    assert cli("optimize", folder / "vit.pt2", "--pass", step, "--no-measure", "-o", small)[0] == 0
    code, _, err = cli("explain", "tokens", small, "--image", folder / "x.png", "-o", drawn)
    assert code == 2
    assert "semantic-tokens wants trace=true" in err
    assert cli("optimize", folder / "vit.pt2", "--pass", f"{step},trace=true", "--no-measure", "-o", small)[0] == 0
    code, out, err = cli("explain", "tokens", small, "--image", folder / "x.png", "-o", drawn)
    assert code == 0, err
    assert "in front of blocks.0: 4 of 16 tokens" in out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("tokens", "vit.pt2", "--image", "x.png"), 2, "no places where tokens are reduced"),
        (("tokns", "vit.pt2", "--image", "x.png"), 2, "known are: tokens"),
        (("tokens", "vit.pt2", "--image", "x.png", "--mean", "a"), 2, "--mean a"),
        (("tokens", "vit.pt2", "--image", "x.png", "--grid", "4"), 2, "ROWSxCOLUMNS"),
        (("tokens", "vit.pt2"), 2, "no places where tokens are reduced"),
        (("tokens", "none.pt2", "--image", "x.png"), 5, "cannot be read"),
    ],
)
def test_what_explain_refuses(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, says: str
) -> None:
    """Before anything is written."""
    monkeypatch.chdir(folder)
    found, _, err = cli("explain", *arguments)
    assert found == code
    assert says in err
    assert not (folder / "tokens.png").exists()
