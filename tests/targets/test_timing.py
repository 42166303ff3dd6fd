"""Where kernels can be timed: not in emulators, and machines are told apart."""

from __future__ import annotations

import pytest

from graphopt.targets import resolve
from graphopt.targets.cpu import host_machine
from graphopt.targets.timing import machine, timing_runner


def test_emulators_do_not_time() -> None:
    """This machine times its own code; ARM under QEMU and a GPU in the interpreter do not count."""
    assert timing_runner(resolve("cpu")) == "native"
    if host_machine() != "aarch64":
        assert timing_runner(resolve("arm:cortex-a76")) == ""
    assert timing_runner(resolve("wasm")) in ("node", "wasmtime", "")


def test_a_machine_has_a_name_that_stays() -> None:
    """The same each time, another for another instruction set or engine, and without line breaks."""
    cpu = resolve("cpu")
    assert machine(cpu) == machine(cpu)
    assert machine(cpu).endswith(f", {cpu.isa.name}")
    assert "\n" not in machine(cpu)
    if runner := timing_runner(resolve("wasm")):
        assert machine(resolve("wasm")).endswith(f" in {runner}")
    assert machine(resolve("wasm")) != machine(cpu)


@pytest.mark.parametrize(
    "facts", ["", "Features : asimd\n", "processor : 0\nmodel name : A\ncpu family : 1\n\nmodel : 9"]
)
def test_what_the_system_does_not_tell(facts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a model name still has a name; only the first processor counts."""
    monkeypatch.setattr("pathlib.Path.read_text", lambda _: facts)
    name = machine(resolve("wasm"))
    assert name
    assert name[0] not in " ,"
    assert "9" not in name.partition(",")[0] or "x86" in name
