"""Hiding symbols of an object file."""

from __future__ import annotations

import subprocess

import pytest

from graphopt.targets import resolve
from graphopt.targets.cpu import host_machine
from graphopt.targets.elf import global_symbols, localise
from graphopt.targets.zig import zig

_SOURCE = """
int elsewhere(int);
static int own(int x) { return elsewhere(x) + 1; }
__attribute__((weak)) int table[3] = {1, 2, 3};
int (*const inner_pointer)(int) = own;
int inner(int x) { return inner_pointer(x) + table[x % 3]; }
int outer(int x) { return inner(x) * 2; }
"""
_MAIN = """
int printf(const char *, ...);
int inner(int x) { return 1000 + x; }
int elsewhere(int x) { return 10 * x; }
int outer(int);
int main(void) { printf("%d %d\\n", outer(4), inner(1)); return 0; }
"""


@pytest.mark.parametrize("spec", ["cpu:x86-64-v2", "arm"])
def test_only_the_kept_symbols_can_be_linked_against(spec, tmp_path):
    """A program may have an `inner` of its own; the object's functions still find theirs, also through pointers."""
    (tmp_path / "a.c").write_text(_SOURCE)
    (tmp_path / "main.c").write_text(_MAIN)

    target = resolve(spec)

    def cc(*arguments):
        machine = ["-target", target.zig, f"-mcpu={target.zig_cpu}"]
        zig(["cc", *machine, "-O2", "-fno-inline", *arguments], tmp_path, name="a", target=spec)

    cc("-c", "a.c", "-ffunction-sections", "-o", "a.o")
    assert global_symbols((tmp_path / "a.o").read_bytes(), defined=False) == ["elsewhere"]
    (tmp_path / "hidden.o").write_bytes(localise((tmp_path / "a.o").read_bytes(), lambda name: name == "outer"))
    cc("main.c", "hidden.o", "-o", "main")
    if target.zig.startswith(f"{host_machine()}-"):
        done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, timeout=60)
        assert done.stdout == "86 1001\n"


def test_other_files_are_refused():
    """An assertion, as only our own linker's output comes here."""
    with pytest.raises(AssertionError, match="ELF"):
        global_symbols(b"MZ" + bytes(64), defined=True)
