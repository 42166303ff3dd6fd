"""Every pass that reduces tokens: its program compiles, and the machine code computes what PyTorch does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.codegen.cuda.emulate import FORWARD, Emulator
from graphopt.codegen.cuda.lower import compile_program
from graphopt.passes import PASSES, PREPARE, load, make
from graphopt.passes.base import run_passes
from graphopt.passes.tokens.base import TokenReduction
from graphopt.passes.tokens.sequence import TokenSequence
from graphopt.program import Program
from graphopt.targets import resolve, run_qemu
from tests.token_models import Dit, PlainMamba, random
from tests.transformer_nets import VisionTransformer
from tests.vision_language import Placed, example, llava

Built = tuple[nn.Module, dict[str, Tensor]]


def vit() -> Built:
    model = random(VisionTransformer(dim=16, heads=2, layers=2, image=32, patch=8, classes=10))
    return model, {"x": torch.randn(1, 3, 32, 32)}


def decoder() -> Built:
    inputs = {"words": example()["input_ids"], "image": torch.randn(1, 16, 32), "places": torch.arange(24)}
    return Placed(llava(layers=2)).eval(), inputs


def scans() -> Built:
    return PlainMamba(layers=2).eval(), {"x": torch.randn(1, 3, 16, 16)}


def dit() -> Built:
    model = random(Dit(dim=16, heads=2, layers=2))
    return model, {"x": torch.randn(1, 3, 8, 8), "t": torch.tensor([3.0]), "y": torch.tensor([1])}


# One place each, or as few as a method has.
CASES: dict[str, tuple[Callable[[], Built], dict[str, Any]]] = {
    "prune-tokens": (vit, {"counts": (9,), "sites": (0,)}),
    "merge-tokens": (vit, {"counts": (9,), "sites": (0,)}),
    "diffrate": (vit, {"counts": (9,), "sites": (0,)}),
    "transform-tokens": (vit, {"counts": (9,), "sites": (0,)}),
    "semantic-tokens": (vit, {"count": 4, "base": 0}),
    "pyramid-drop": (decoder, {"counts": (5,), "sites": (0,)}),
    "visiondrop": (decoder, {"counts": (5,), "sites": (0,), "reducer": "contextual:context=2"}),
    "adatoken": (decoder, {"counts": (5,), "sites": (0,)}),
    "core-matching": (decoder, {"counts": (5,), "sites": (0,)}),
    "aim": (decoder, {"merged": 0.5, "first": 0, "layers": 2}),
    "lvlm-csp": (decoder, {"pruned": 0.25, "scatter": 1, "prune": 1}),
    "drop-segments": (decoder, {"segments": ("4:9",), "sites": (0,)}),
    "prune-scan-tokens": (scans, {"counts": (9,), "sites": (0,)}),
    "flexdit": (dit, {"grid": 2, "poolings": 0, "modules": 1, "sparse": 0, "dense": 0}),
}


class Together(nn.Module):
    """Programs of the same inputs, by name: compiled at once, as what they share is then compiled once."""

    def __init__(self, programs: dict[str, Program]) -> None:
        super().__init__()
        self.own = nn.ModuleDict({name: program.to_module() for name, program in programs.items()})

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {name: module(**inputs) for name, module in self.own.items()}


@cache
def reduced(build: Callable[[], Built], *names: str) -> tuple[Program, dict[str, Tensor], dict[str, Tensor]]:
    """The programs of passes on a model (all that have it if none is named), inputs, what PyTorch gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = build()
    program = run_passes(graphopt.capture(model, inputs), PREPARE)
    own = {
        name: make(name, **options)(program)
        for name, (build_, options) in CASES.items()
        if build_ is build and (not names or name in names)
    }
    assert all(each.records[-1].changed for each in own.values())
    wanted = {name: next(iter(each.run(inputs).values())) for name, each in own.items()}
    return graphopt.capture(Together(own).eval(), inputs), inputs, wanted


def test_every_pass_that_reduces_tokens_is_tested_here() -> None:
    """All that are registered."""
    kinds = (TokenReduction, TokenSequence)
    assert {name for name in PASSES if issubclass(load(name), kinds)} | {"flexdit", "semantic-tokens"} == set(CASES)


@pytest.mark.parametrize("spec", ["cpu:x86-64-v3", "wasm"])
@pytest.mark.parametrize("build", [vit, decoder, scans, dit])
def test_compiled_programs_agree_with_pytorch(build: Callable[[], Built], spec: str) -> None:
    """Every pass, on the host and in the browser's machine."""
    compiles(spec, build)


def half() -> Built:
    model, inputs = vit()
    return model.bfloat16(), {name: value.bfloat16() for name, value in inputs.items()}


def test_models_in_half_precision_compile() -> None:
    """Scores, likeness and means are single there, so artefact and PyTorch choose alike; the stream stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = half()
    program = run_passes(graphopt.capture(model, inputs), PREPARE)
    own = {
        name: make(name, **CASES[name][1])(program)
        for name in ("prune-tokens", "merge-tokens", "diffrate", "transform-tokens")
    }
    assert {each.outputs[0].torch_dtype for each in own.values()} == {torch.bfloat16}
    with graphopt.compile(Together(own).eval(), example_inputs=inputs) as bundle:
        assert bundle.manifest.verification.passed


def test_compiled_for_arm() -> None:
    """Merging, in the emulator."""
    if not shutil.which(run_qemu.QEMU):
        pytest.skip("no emulator")
    compiles("arm", vit, "merge-tokens")


def compiles(spec: str, build: Callable[[], Built], *names: str) -> None:
    program, inputs, wanted = reduced(build, *names)
    with graphopt.compile(program, target=spec) as bundle:
        got = bundle.run(inputs)
    agree(list(got.values()) if isinstance(got, dict) else [got], wanted)


def agree(got: Sequence[np.ndarray], wanted: dict[str, Tensor]) -> None:
    for mine, (name, theirs) in zip(got, wanted.items(), strict=True):
        torch.testing.assert_close(
            torch.from_numpy(mine), theirs, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_compiled_for_cuda() -> None:
    """Choosing and gathering as CUDA kernels, on the emulated driver."""
    program, inputs, wanted = reduced(vit, "prune-tokens")
    artefact = compile_program(program, resolve("cuda:sm_80"))
    with Emulator(artefact.cuda_source) as emulator:
        agree(emulator.run(artefact, [value.numpy() for value in inputs.values()], FORWARD), wanted)
