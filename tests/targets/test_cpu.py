"""x86-64 targets: what is detected, and what may be switched on."""

from __future__ import annotations

import pytest
from tvm import te

from graphopt.codegen.build import build_llvm
from graphopt.targets import cpu, resolve
from graphopt.targets.target import AVX2, AVX512, SSE4

_V3 = {"sse4.1", "sse4.2", "avx", "avx2", "fma", "f16c", "bmi", "bmi2"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

on_x86 = pytest.mark.skipif(cpu.host_machine() != "x86_64", reason="detection of x86-64 processors")


@pytest.fixture
def host(monkeypatch):
    """This machine with other features, as /proc/cpuinfo would tell them."""

    def make(features):
        monkeypatch.setattr(cpu, "host_features", lambda: frozenset(features))
        return cpu.host.__wrapped__()

    return make


@on_x86
def test_masked_avx512_stays_off_whatever_the_model_is(host):
    """The processor's model has AVX-512 and the hypervisor masks it: no kernel may use it."""
    target = host(_V3)
    assert target.isa is AVX2
    assert {"+avx2", "+fma", "-avx512f", "-avx512vl"} <= set(target.llvm["mattr"])


@on_x86
def test_a_full_set_is_used(host):
    """512 bits need all five extensions of the level; FMA needs AVX2 as well."""
    assert host(_V4).isa is AVX512
    assert host(_V4 - {"avx512dq"}).isa is AVX2
    assert host(_V3 - {"fma"}).isa is SSE4


@on_x86
@pytest.mark.parametrize(("features", "register"), [(_V3, "zmm"), ({"sse4.1", "sse4.2"}, "ymm")])
def test_code_for_this_machine_has_no_wider_registers(host, features, register):
    """What is switched off does not come in through the processor's name or LLVM's own vectoriser."""
    x = te.placeholder((4096,), name="x")
    func = te.create_prim_func([x, te.compute((4096,), lambda i: x[i] * 2.0 + 1.0, name="y")])
    assert register not in build_llvm({"f": func}, host(features)).inspect_source("asm")


def test_this_machine_runs_what_it_has():
    """`cpu` runs here; a level runs here exactly if its features are here."""
    if cpu.host_machine() != "x86_64":
        pytest.skip("named processors are x86-64")
    assert cpu.runs_here(resolve("cpu"))
    assert cpu.runs_here(resolve("cpu:x86-64-v4")) == (cpu.host_features() >= _V4)
    assert not cpu.runs_here(resolve("arm:cortex-a76"))
    assert not cpu.runs_here(resolve("wasm"))


@pytest.mark.parametrize(
    ("spec", "isa"),
    [
        ("cpu:generic", SSE4),
        ("cpu:haswell", AVX2),
        ("cpu:znver3", AVX2),
        ("cpu:znver4", AVX512),
        ("cpu:skylake-avx512", AVX512),
    ],
)
def test_named_processors_have_their_vector_unit(spec, isa):
    """A few that everybody knows."""
    assert resolve(spec).isa is isa
