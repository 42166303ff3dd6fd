"""Timing against other engines: in one run, on the same model, refused where it would compare different things."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import graphopt
from graphopt import bench as benches
from graphopt.bench import RIVALS, as_list, bench, find_model
from graphopt.errors import BadOption, Exit, ToolMissing, UnknownRival
from tests.graphopt.two_outputs import Small, small, small_inputs

Cli = Callable[..., tuple[int, str, str]]


def inputs() -> dict[str, object]:
    """The example inputs as arrays by name."""
    return dict(zip(("image", "shift"), (tensor.numpy() for tensor in small_inputs()), strict=True))


def test_rivals_take_turns(small_bundle: graphopt.Bundle, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each engine runs in each round; the ratio is to the bundle's minimum."""
    turns: list[str] = []

    def adapter(name: str) -> benches.Rival:
        def make(program: graphopt.Program, arrays: object, threads: int) -> Callable[[], object]:
            run = benches.torch_eager(program, inputs(), threads)  # type: ignore[arg-type]

            def logged() -> object:
                turns.append(name)
                return run()

            return logged

        return make

    monkeypatch.setattr(benches, "RIVALS", {"a": adapter("a"), "b": adapter("b")})
    program = graphopt.capture(model_file)
    timings = bench(small_bundle, program, inputs(), ["a", "b"], seconds=0.0)  # type: ignore[arg-type]
    assert [timing.engine for timing in timings] == ["cpu", "a", "b"]
    assert timings[0].ratio == 1.0
    assert timings[1].ratio == timings[1].min_seconds / timings[0].min_seconds
    assert timings[1].runs == timings[2].runs == 9
    assert timings[1].max_abs_difference < 1e-4
    rounds = "".join(turns)[4:]  # after two runs each that prepare and compare
    assert rounds == "aaaabbbb" * 3


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_computes_the_same(name: str, model_file: Path) -> None:
    """Each adapter agrees with PyTorch, or says what is to be installed."""
    program = graphopt.capture(model_file)
    try:
        run = RIVALS[name](program, inputs(), 1)  # type: ignore[arg-type]
    except ToolMissing as error:
        pytest.skip(str(error))
    logits, best = as_list(run())
    with torch.inference_mode():
        want = small()(*small_inputs())
    torch.testing.assert_close(torch.from_numpy(logits), want["logits"], rtol=1e-4, atol=1e-5)
    assert best.tolist() == want["best"].tolist()


def test_a_rival_that_is_not_installed(
    cli: Cli, small_bundle: graphopt.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 3, which rival it is and how to install what it lacks, before anything is run or timed."""
    monkeypatch.setattr(benches, "find_spec", lambda name: None if name == "onnxscript" else name)
    monkeypatch.setattr(graphopt.Bundle, "runner", property(lambda _: pytest.fail("the bundle was opened")))
    code, _, err = cli("bench", small_bundle.path, "--against", "torch", "--against", "onnxruntime", "-v")
    assert code == Exit.UNAVAILABLE
    assert "onnxscript is needed to compare with onnxruntime, and was not found" in err
    assert "pip install 'graphopt[onnx]'" in err
    assert "capturing" not in err
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    code, _, err = cli("bench", small_bundle.path, "--against", "torch-compile")
    assert code == Exit.UNAVAILABLE
    assert "a C++ compiler is needed to compare with torch-compile" in err


def test_bench_on_the_command_line(cli: Cli, small_bundle: graphopt.Bundle) -> None:
    """The model beside the bundle is found; JSON has a row for each engine."""
    assert find_model(small_bundle.path) == small_bundle.path.with_suffix(".pt2")
    code, out, err = cli("bench", small_bundle.path, "--against", "torch", "--seconds", "0", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["threads"] == 1
    assert [row["engine"] for row in data["timings"]] == ["cpu", "torch"]
    code, out, _ = cli("bench", small_bundle.path, "--seconds", "0")
    assert code == 0
    assert "this bundle (cpu)" in out


def test_another_model_is_refused(small_bundle: graphopt.Bundle) -> None:
    """Other inputs, other weights, no model at all: nothing is timed."""
    image, shift = small_inputs()
    with pytest.raises(BadOption, match="no model in it"):
        bench(small_bundle, None, inputs(), ["torch"], seconds=0.0)  # type: ignore[arg-type]
    other = graphopt.capture(Small(), (image.repeat(2, 1, 1, 1), shift))
    with pytest.raises(BadOption, match="other inputs than the bundle"):
        bench(small_bundle, other, inputs(), ["torch"], seconds=0.0)  # type: ignore[arg-type]
    trained = small()
    torch.nn.init.constant_(trained.head.bias, 50.0)
    with pytest.raises(BadOption, match="computes something else"):
        bench(small_bundle, graphopt.capture(trained, (image, shift)), inputs(), ["torch"], seconds=0.0)  # type: ignore[arg-type]
    with pytest.raises(UnknownRival, match="did you mean torch"):
        bench(small_bundle, other, inputs(), ["torhc"], seconds=0.0)  # type: ignore[arg-type]
