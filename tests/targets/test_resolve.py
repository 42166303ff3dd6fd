"""Names of targets, and what can be built and run here."""

from __future__ import annotations

import pytest

from graphopt import targets
from graphopt.errors import Exit, UnknownTarget
from graphopt.targets import availability, missing_for, names, resolve, run_node, run_qemu, runners_of, warning


@pytest.mark.parametrize("spec", names())
def test_every_name_resolves_to_a_target_that_resolves_again(spec):
    """A target's own spec names the same target; only a bare family may stand for a longer one."""
    target = resolve(spec)
    assert resolve(target.spec) == target
    assert target.spec == spec or ":" not in spec
    assert target.source


def test_names_are_read_without_regard_to_case_and_space():
    """What people type."""
    assert resolve(" ARM:Cortex-A76 ").spec == "arm:cortex-a76"


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("arm:cortex_a76", "arm:cortex-a76"),
        ("haswell", "cpu:haswell"),
        ("cortex-a72", "arm:cortex-a72"),
        ("wasm:relax", "wasm:relaxed"),
        ("web", None),
        ("", None),
    ],
)
def test_an_unknown_name_gets_the_near_one_suggested(slip, meant):
    """Bad input, exit 2; the suggestion is itself a target."""
    with pytest.raises(UnknownTarget) as caught:
        resolve(slip)
    assert caught.value.exit is Exit.BAD_INPUT
    if meant is not None:
        assert str(caught.value).startswith(f"error[unknown-target]: {slip}: no such target; did you mean {meant}?")


def test_only_the_slow_fallback_has_a_warning():
    """cpu:generic is rarely what anybody wants, and says so."""
    assert "several times slower" in warning(resolve("cpu:generic"))
    assert not any(warning(resolve(spec)) for spec in names() if spec != "cpu:generic")


def test_availability_has_a_row_for_every_target():
    """Where something cannot be run, the row says what is missing; where it can, nothing is."""
    rows = {row.spec: row for row in availability()}
    assert list(rows) == names()
    for row in rows.values():
        assert bool(row.missing) == (not row.builds or not row.runners), row


def test_a_missing_tool_is_named_with_the_way_to_install_it(monkeypatch):
    """Without qemu, ARM can be built and not run."""
    monkeypatch.setattr(run_qemu.shutil, "which", lambda _: None)
    monkeypatch.setattr(run_qemu, "host_machine", lambda: "x86_64")
    monkeypatch.setattr("graphopt.targets.run_native.runs_here", lambda _: False)
    arm = resolve("arm")
    assert missing_for(arm, run=False) == []
    assert missing_for(arm, run=True) == [run_qemu.INSTALL]
    assert runners_of(arm) == ()


def test_an_old_node_is_not_used(monkeypatch):
    """Node 16 has no fetch; wasmtime runs the module nevertheless."""
    monkeypatch.setattr(run_node, "version", lambda _: 16)
    assert runners_of(resolve("wasm")) == ("wasmtime",)


def test_families_and_their_modules_agree():
    """Each family of the table is a module with its own tables."""
    assert list(targets.FAMILIES) == ["cpu", "arm", "wasm", "cuda"]
    for family in targets.FAMILIES:
        assert resolve(family).kind == family
