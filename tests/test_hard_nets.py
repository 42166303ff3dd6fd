"""The models that break other tools: captured, canonicalised, compiled."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt.passes import CANONICALISE
from graphopt.passes.base import run_passes
from tests.hard_nets import HARD
from tests.programs import assert_same, hard
from tests.test_models import check


@pytest.mark.parametrize("name", HARD)
def test_captured_and_canonicalised(name: str) -> None:
    """Capture gives what the module gives, to the bit or to rounding; canonicalisation changes nothing but rounding."""
    module, inputs = HARD[name]()
    program = hard(name)
    with torch.inference_mode():
        wanted = module(**inputs)
    wanted = [wanted] if isinstance(wanted, torch.Tensor) else list(wanted)
    for got, expected in zip(program.run(inputs).values(), wanted, strict=True):
        assert expected.isfinite().all()
        assert expected.abs().max() > 1e-3, "an output that is nearly zero shows no mistakes"
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert_same(program, run_passes(program, CANONICALISE), tolerance=1e-4)


@pytest.mark.parametrize("name", HARD)
def test_compiled(name: str) -> None:
    """Each compiles for this machine and agrees with PyTorch."""
    with graphopt.compile(hard(name)) as bundle:
        check(bundle)
