"""What the inner loops become on each instruction set, by counts: fused multiply-adds, no vectors through the stack."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from graphopt.codegen.kernels.conv2d import Conv2d
from graphopt.codegen.kernels.depthwise import DepthwiseConv2d
from graphopt.codegen.kernels.gemm import Gemm
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.targets.target import AVX512, RELAXED_SIMD, Target
from tests.codegen.kernels.dense import Case, Shape, convolution, linear
from tests.codegen.kernels.harness import ARM, HOST, WASM, assembly, match

LEVEL4 = replace(HOST, llvm={**HOST.llvm, "mcpu": "skylake-avx512", "mattr": ["-prefer-256-bit"]}, isa=AVX512)
RELAXED = replace(WASM, llvm={**WASM.llvm, "mattr": ["+simd128", "+relaxed-simd"]}, isa=RELAXED_SIMD)

# Target, its multiply-add (or multiply) on whole registers, what a vector in memory of the stack looks like.
TARGETS = {
    "avx2": (HOST, r"\tvfmadd\d+ps\t.*ymm", r"\tv(?!broadcast).*\(%rsp"),
    "avx512": (LEVEL4, r"\tvfmadd\d+ps\t.*zmm", r"\tv(?!broadcast).*\(%rsp"),
    "neon": (ARM, r"\tfmla\tv\d+\.4s", r"\t(ldr|str|ldp|stp)\tq.*\[sp"),
    "simd128": (WASM, r"\tf32x4\.mul", r"__stack_pointer"),
    "relaxed": (RELAXED, r"\tf32x4\.relaxed_madd", r"__stack_pointer"),
}


def hottest_block(text: str, operation: str) -> str:
    """The straight piece of assembly with the most of an operation."""
    blocks = re.split(r"^(?:\.LBB\w+:|\tj\w+\t|\tb\.\w+\t|\tcbn?z\t|\tloop|\tend_loop).*$", text, flags=re.M)
    return max(blocks, key=lambda b: len(re.findall(operation, b)))


def inner_loop(case: Case, template: Template, name: str) -> tuple[KernelCall, str, int]:
    """The kernel for a target, its inner loop, and the multiply-adds in it."""
    target, operation, _ = TARGETS[name]
    call = match(case.flow, template, target)
    assert isinstance(call, KernelCall)
    block = hottest_block(assembly(call.kernel, target), operation)
    return call, block, len(re.findall(operation, block))


def lanes(target: Target) -> int:
    """Floats in a register."""
    return target.isa.lanes()


@pytest.mark.parametrize("name", TARGETS)
def test_product_keeps_its_tile_in_registers(name):
    """Whole trips of mr * nr / lanes multiply-adds, no vector through the stack."""
    call, block, count = inner_loop(linear((192, 384), 384, "bias", Gemm()), Gemm(), name)
    target, _, spill = TARGETS[name]
    each = int(call.parameters["mr"]) * int(call.parameters["nr"]) // lanes(target)
    assert each >= 8, "too few accumulators to hide latency"
    assert count >= each
    assert count % each == 0
    assert not re.search(spill, block), block


@pytest.mark.parametrize("name", TARGETS)
def test_convolution_keeps_its_tile_in_registers(name):
    """The same for a padded 3 x 3 convolution, whose rows lie apart."""
    shape = Shape((28, 28), 64, 128, padding=(1, 1, 1, 1))
    call, block, count = inner_loop(convolution(shape, "bias", Conv2d()), Conv2d(), name)
    target, _, spill = TARGETS[name]
    each = int(call.parameters["mr"]) * int(call.parameters["nr"]) // lanes(target)
    assert count >= each
    assert count % each == 0
    assert not re.search(spill, block), block


@pytest.mark.parametrize("name", TARGETS)
def test_depthwise_keeps_its_strip_in_registers(name):
    """One kernel row: three multiply-adds for each result of the strip."""
    shape = Shape((56, 56), 64, 64, padding=(1, 1, 1, 1), groups=64)
    call, block, count = inner_loop(convolution(shape, "bias", DepthwiseConv2d()), DepthwiseConv2d(), name)
    _, _, spill = TARGETS[name]
    assert count >= 3 * int(call.parameters["strip"]) - 1
    assert not re.search(spill, block), block


@pytest.mark.parametrize("name", TARGETS)
def test_no_calls_into_the_runtime(name):
    """Scratch comes as a parameter, accumulators are no memory: nothing is allocated."""
    target = TARGETS[name][0]
    call = match(linear((64, 64), 64, "bias", Gemm()).flow, Gemm(), target)
    assert isinstance(call, KernelCall)
    assert "AllocWorkspace" not in assembly(call.kernel, target)
