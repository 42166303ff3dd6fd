"""What the tests of reductions share: prepared programs, and that what comes out is the masked program."""

from __future__ import annotations

from functools import cache

import torch

from graphopt.axes import infer
from graphopt.passes import PREPARE
from graphopt.passes.base import run_passes
from graphopt.passes.reduction import Reduction
from graphopt.program import Program
from tests.masking import masked_run
from tests.programs import hard, tiny


@cache
def prepared(name: str) -> Program:
    """A model of the zoo at test size (`hard:` in front: one that breaks other tools), as `optimize` prepares it."""
    program = hard(name.removeprefix("hard:")) if name.startswith("hard:") else tiny(name)
    return run_passes(program, PREPARE, check=False)


def assert_is_masked(reduction: Reduction, before: Program, after: Program, *, tolerance: float = 2e-4) -> None:
    """`after` computes what `before` does with the items masked that the reduction's plan drops."""
    axes = infer(before)
    keep = reduction.plan(axes).keep
    assert keep, "nothing was cut"
    inputs = before.example_inputs
    assert inputs is not None
    wanted, got = masked_run(axes, keep, inputs), after.run(inputs)
    for name, value in wanted.items():
        scale = max(1.0, float(value.abs().max())) if value.is_floating_point() else 1.0
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance * scale)


def share(after: Program, kind: str) -> float:
    """What the last pass left of FLOPs, parameters or bytes, as a share of what it was given."""
    record = after.records[-1]
    return getattr(record, f"{kind}_after") / getattr(record, f"{kind}_before")


def shapes(program: Program) -> dict[str, list[int]]:
    """The stored weights of more than one dimension by name."""
    specs = {s.arg.name: s.target for s in program.exported.graph_signature.input_specs}
    return {specs[name]: list(t.shape) for name, t in program.tensors.items() if t.dim() > 1}
