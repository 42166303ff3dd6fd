"""The registry, the pipeline and the runner."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from graphopt.capture import capture
from graphopt.edit import Edit
from graphopt.passes import CANONICALISE, PASSES, load, make
from graphopt.passes.base import InvalidProgram, Pass, Record, max_abs_errors, run_passes
from tests.models import TINY
from tests.programs import assert_same, ops, program_of, tiny


@pytest.mark.parametrize("name", PASSES)
def test_registered_means_documented_and_tested(name):
    """Name, file, class and test file agree; the docstring shows before and after."""
    found = load(name)
    stem = name.replace("-", "_")
    assert found.name == name
    assert found.__module__ == f"graphopt.passes.{stem}"
    assert found.__name__ == "".join(part.capitalize() for part in name.split("-"))
    assert "before" in found.__doc__
    assert "after" in found.__doc__
    assert importlib.util.find_spec(f"tests.passes.test_{stem}")
    assert isinstance(make(name), Pass)


@pytest.mark.parametrize("name", TINY)
def test_canonicalise_keeps_what_every_model_computes(name):
    """The whole pipeline on each model: same results, no batch norm, no more FLOPs."""
    before = tiny(name)
    text = str(before)
    after = run_passes(before, CANONICALISE)
    assert str(before) == text
    assert_same(before, after, tolerance=1e-4)
    assert [record.name for record in after.records] == list(CANONICALISE)
    assert all(record.max_abs_error is not None for record in after.records)
    assert not {"_native_batch_norm_legit_no_training", "dropout", "clone"} & set(ops(after))
    assert after.records[-1].flops_after <= after.records[0].flops_before


@pytest.mark.parametrize("name", ["bert", "llama", "unet"])
def test_canonical_programs_round_trip(name, tmp_path):
    """New and replaced tensors, and all records, are written and read back."""
    after = run_passes(tiny(name), CANONICALISE)
    after.save(tmp_path / "m.pt2")
    again = capture(tmp_path / "m.pt2")
    assert (str(again), again.records) == (str(after), after.records)
    assert_same(after, again)


def test_canonicalise_is_idempotent():
    """A second time changes nothing."""
    once = run_passes(tiny("swin"), CANONICALISE)
    twice = run_passes(once, CANONICALISE)
    assert str(twice) == str(once)
    assert [record.total for record in twice.records[len(CANONICALISE) :]] == [0] * len(CANONICALISE)


@dataclass(frozen=True)
class Double(Pass):
    """A pass that is wrong: it doubles the output."""

    name: ClassVar[str] = "double"

    def apply(self, edit: Edit) -> None:
        output = edit.graph.output_node()
        (value,) = output.all_input_nodes
        with edit.graph.inserting_before(output):
            new = edit.call(torch.ops.aten.mul.Tensor, (value, 2.0), like=output)
        output.args = ((new,),)


@dataclass(frozen=True)
class Lossy(Double):
    """The same on purpose."""

    name: ClassVar[str] = "lossy"
    lossless: ClassVar[bool] = False


@dataclass(frozen=True)
class Break(Pass):
    """A pass that leaves a node in front of what it reads."""

    name: ClassVar[str] = "break"

    def apply(self, edit: Edit) -> None:
        nodes = [node for node in edit.graph.nodes if node.op == "call_function"]
        nodes[0].prepend(nodes[-1])


def test_wrong_passes_are_caught():
    """A pass that changes what is computed is named, with the output, the error and the lines that differ."""
    program = program_of(lambda s, x: x.sin(), torch.ones(3))
    with pytest.raises(InvalidProgram, match=r"double changed output output by 0\.841471") as caught:
        run_passes(program, [Double()])
    assert "after" in str(caught.value)
    assert "mul" in str(caught.value)
    assert run_passes(program, [Double()], check=False)(torch.ones(3))[0] == pytest.approx(1.682942)


def test_lossy_passes_may_change_results_and_set_the_new_standard():
    """After a lossy pass the following are compared with what it left."""
    program = program_of(lambda s, x: x.sin(), torch.ones(3))
    after = run_passes(program, [Lossy(), "eliminate-dead-code"])
    assert after.records[0].max_abs_error is None
    assert after.records[1].max_abs_error == 0


def test_broken_graphs_are_caught():
    """A graph that does not even run is the pass's fault, and says so."""
    with pytest.raises(InvalidProgram, match="break left an invalid program"):
        Break()(program_of(lambda s, x: x.sin().cos(), torch.ones(3)))


def test_progress_and_dump(tmp_path):
    """Each pass is announced; the text before and after each is a file, numbered in order."""
    seen = []
    run_passes(tiny("crnn"), CANONICALISE, progress=lambda *event: seen.append(event), dump=tmp_path / "dump")
    assert seen == [(name, place, len(CANONICALISE)) for place, name in enumerate(CANONICALISE)]
    files = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert files == ["00-captured.txt", *(f"{n + 1:02d}-{name}.txt" for n, name in enumerate(CANONICALISE))]
    assert (tmp_path / "dump" / "00-captured.txt").read_text() == f"{tiny('crnn')}\n"


def test_unknown_passes_and_options():
    """A name that is not registered is a KeyError, an unknown option a TypeError."""
    with pytest.raises(KeyError):
        make("no-such-pass")
    with pytest.raises(TypeError):
        make("fold-constants", growth=3)


def test_records_compare_without_time():
    """Two runs of a pass leave equal records; JSON has the time only on request."""
    first, second = (run_passes(tiny("crnn"), CANONICALISE).records for _ in range(2))
    assert first == second
    assert "seconds" not in first[0].to_json()
    assert first[0].to_json(seconds=True)["seconds"] > 0
    assert Record.from_json(first[0].to_json()) == first[0]


def test_errors_between_outputs():
    """NaN in the same place is equal, in another infinitely wrong; so are other shapes and dtypes."""
    nan = float("nan")
    wanted = torch.tensor([1.0, nan, float("inf")])
    assert max_abs_errors({"y": wanted}, {"y": wanted.clone()}) == {"y": 0.0}
    assert max_abs_errors({"y": wanted}, {"y": torch.tensor([1.5, nan, float("inf")])}) == {"y": 0.5}
    for other in (torch.tensor([nan, 1.0, 2.0]), torch.ones(2), wanted.double(), torch.tensor([1.0, 2.0, 3.0])):
        assert max_abs_errors({"y": wanted}, {"y": other}) == {"y": float("inf")}
    assert max_abs_errors({"y": torch.tensor([True])}, {"y": torch.tensor([False])}) == {"y": 1.0}
