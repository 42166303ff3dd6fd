"""What the inner loops become on each instruction set, by counts: fused multiply-adds, no vectors through the stack."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from graphopt.codegen.kernels import spmm_plan, spmm_tile
from graphopt.codegen.kernels.conv2d import Conv2d
from graphopt.codegen.kernels.depthwise import DepthwiseConv2d
from graphopt.codegen.kernels.gemm import Gemm
from graphopt.codegen.kernels.spmm import SparseProduct
from graphopt.codegen.kernels.spmm_tile import HEIGHTS, Panels, most_vectors, tail_vectors
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.targets.target import AVX512, RELAXED_SIMD, Target
from tests.codegen.kernels import channels_first
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


def straight(text: str) -> list[str]:
    """Assembly in pieces without jumps."""
    return re.split(r"^(?:\.LBB\w+:|\tj\w+\t|\tb\.\w+\t|\tcbn?z\t|\tloop|\tend_loop).*$", text, flags=re.M)


def hottest_block(text: str, operation: str) -> str:
    """The straight piece of assembly with the most of an operation."""
    return max(straight(text), key=lambda b: len(re.findall(operation, b)))


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


def products(height: int, group: Panels, whole: int) -> int:
    """Multiply-adds of whole registers for a block: one a vector and output, fewer where outputs share a vector."""
    count = 0
    for place in group.places:
        if place.elements == whole:
            count += height
        elif height * place.elements >= whole:
            count += tail_vectors(place.elements, height, whole)
    return count


def check_blocks(case: Case, name: str) -> KernelCall:
    """Every loop over blocks has whole trips of height * vectors multiply-adds, and no vector through the stack."""
    target, operation, spill = TARGETS[name]
    call = case.call
    plan = call.key[0]
    trips = {products(section.height, group, plan.lanes) for section in plan.sections for group in plan.panels}
    seen = set()
    for block in straight(assembly(call.kernel, target)):
        count = len(re.findall(operation, block))
        if not count:
            continue
        seen |= {each for each in trips if count % each == 0}
        assert any(count % each == 0 for each in trips), f"{count} of {trips}: {block}"
        assert not re.search(spill, block), block
        # One instruction set multiplies and adds apart: as many of one as of the other.
        if not target.isa.has_fma:
            assert len(re.findall(operation.replace("mul", "add"), block)) == count
        # Every multiply-add is of whole registers.
        assert not re.search(r"\t(vfmadd\d+ss|vmulss|fmadd|fmul\ts|f32\.mul)\b", block), block
    assert seen == trips
    return call


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("name", TARGETS)
def test_widest_sparse_tiles_stay_in_registers(name, height, monkeypatch):
    """The most vectors that may be chosen for each height of blocks, for rows of tokens."""
    target = TARGETS[name][0]
    most = most_vectors(height, target.isa)
    monkeypatch.setattr(spmm_plan, "HEIGHTS", (height,))
    monkeypatch.setattr(spmm_plan, "most_vectors", lambda height, isa: most)

    def widest(rows, width, pitch, lanes, _, tail=0):
        return spmm_tile.rows_of_pixels(rows, width, pitch, lanes, most, tail)

    # However the estimates weigh it: the widest is what is left where narrower ones are not asked for.
    monkeypatch.setattr(spmm_plan, "rows_of_pixels", widest)
    # Rows of whole vectors, and with a few tokens left over; all at once, and in runs with what comes fetched ahead.
    for tokens in (lanes(target) * most * 2, lanes(target) * (most * 2 - 1) + 1):
        for runs in (1, 2):
            monkeypatch.setattr(spmm_plan, "_runs", lambda *_, runs=runs: (runs,))
            monkeypatch.setattr(spmm_plan, "_missed", lambda *_, runs=runs: runs - 1.0)
            case = channels_first.linear(64, 128, tokens, "bias", SparseProduct(), word="dense", target=target)
            call = check_blocks(case, name)
            assert (call.parameters["vectors"], call.parameters["runs"]) == (most, runs)


@pytest.mark.parametrize("word", ["unstructured", "4x1", "2:4"])
@pytest.mark.parametrize("name", TARGETS)
def test_chosen_sparse_tiles_stay_in_registers(name, word):
    """A layer of MobileNet, a padded 3 x 3 convolution and a linear layer, with the tiles that are chosen for them."""
    target = TARGETS[name][0]
    given = {"word": word, "keep": 0.15, "target": target}
    three = Shape((14, 14), 64, 64, padding=(1, 1, 1, 1))
    for case in (
        channels_first.convolution(Shape((14, 14), 256, 256, (1, 1)), "bias_relu6", SparseProduct(), **given),
        channels_first.convolution(three, "bias_residual_relu", SparseProduct(), **given),
        channels_first.linear(256, 192, 197, "bias", SparseProduct(), **given),
    ):
        call = check_blocks(case, name)
        assert int(call.parameters["height"]) * int(call.parameters["vectors"]) >= 4, "too few to hide latency"


@pytest.mark.parametrize("name", TARGETS)
def test_no_calls_into_the_runtime(name):
    """Scratch comes as a parameter, accumulators are no memory: nothing is allocated."""
    target = TARGETS[name][0]
    call = match(linear((64, 64), 64, "bias", Gemm()).flow, Gemm(), target)
    assert isinstance(call, KernelCall)
    assert "AllocWorkspace" not in assembly(call.kernel, target)
