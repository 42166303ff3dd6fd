"""From an artefact to files that run: compile its C, add the runtime, link, and put weights and header beside it.

    cpu, arm, cuda    libNAME.so, libNAME.a, NAME.h, weights.bin; cuda also NAME.cubin, NAME.ptx, NAME.cu
    wasm              NAME.wasm, NAME.mjs, NAME.d.mts, weights.bin

Everything is compiled under relative names in a folder of its own, so equal artefacts give equal bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.errors import CannotWrite, LinkFailed
from graphopt.targets.elf import localise
from graphopt.targets.loader import declarations, loader
from graphopt.targets.target import Kind, Target
from graphopt.targets.zig import zig

if TYPE_CHECKING:
    from graphopt.codegen.artefact import Artefact

WEIGHTS = "weights.bin"

# What `link` can make for each kind of target, and what goes into its bundle.
PARTS: dict[Kind, tuple[str, ...]] = {"cpu": ("so", "a"), "arm": ("so", "a"), "wasm": ("wasm",), "cuda": ("so", "a")}

_RUNTIME: dict[Kind, tuple[str, ...]] = {
    "cpu": ("threads.c", "weights.c", "kernel_support.c"),
    "arm": ("threads.c", "weights.c", "kernel_support.c"),
    "cuda": ("weights.c",),
    "wasm": ("kernel_support.c",),
}
_COMPILE = ["-std=gnu11", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-ffunction-sections", "-fdata-sections"]
_COMPILE += ["-fno-sanitize=all", "-fno-stack-protector", "-fno-addrsig", "-fno-ident"]
# What a program that links the static library has to give, too.
LIBRARIES = ("-lm", "-lpthread", "-ldl")
_WASM_STACK_BYTES = 1 << 20


def runtime_folder() -> Path:
    """Where the C and JavaScript sources of the runtime are installed."""
    import graphopt.codegen

    return Path(graphopt.codegen.__file__).parent / "runtime"


def symbols_of(name: str) -> str:
    """The compiler's option that the runtime's sources need: how the functions of the model `name` are called."""
    return f"-DGRAPHOPT_SYMBOL(function)={name}_##function"


def link(artefact: Artefact, target: Target, kind: str, folder: Path) -> dict[str, Path]:
    """Link `artefact` into `folder`, which exists.

    Args:
        artefact: what code generation made for `target`.
        target: what it was made for.
        kind: "so", "a" or "wasm", or "bundle" for all that the target has.
        folder: where the files go, under the names in the module's docstring; files of these names are replaced.

    Returns:
        The files by part: "so", "a", "header", "wasm", "module", "types", "weights".

    Raises:
        ToolMissing: the toolchain is not installed.
        NoRoom: the temporary files cannot be written.
        LinkFailed: the compiler or the linker refused; undefined symbols are named.
        CannotWrite: the folder cannot be written.
    """
    parts = PARTS[target.kind] if kind == "bundle" else (kind,)
    assert set(parts) <= set(PARTS[target.kind]), f"{target.kind} has no {kind}"
    name = artefact.name
    with tempfile.TemporaryDirectory(prefix="graphopt-link-") as work:
        place = Path(work)
        if target.kind == "wasm":
            made = {"wasm": (f"{name}.wasm", _wasm(artefact, target, place))}
            made["module"] = (f"{name}.mjs", loader(artefact, target, runtime_folder()).encode())
            made["types"] = (f"{name}.d.mts", declarations(artefact, runtime_folder()).encode())
        else:
            made = _elf(artefact, target, parts, place)
            made["header"] = (f"{name}.h", artefact.sources[f"{name}.h"].encode())
    made["weights"] = (WEIGHTS, artefact.weights)
    if kind == "bundle":
        made |= {file: (file, content) for file, content in artefact.files.items()}
    return {part: _write(folder / file, content) for part, (file, content) in made.items()}


def is_public(name: str) -> Callable[[str], bool]:
    """Whether a symbol belongs to the interface of the model `name`."""
    functions = ["run", "workspace_bytes", "weights_bytes", "set_threads", "map_weights", "unmap_weights"]
    # The last four are those of a library for the GPU.
    functions += ["load", "unload", "run_device", "error"]
    return {f"{name}_{function}" for function in functions}.__contains__


def _elf(artefact: Artefact, target: Target, parts: Sequence[str], place: Path) -> dict[str, tuple[str, bytes]]:
    name = artefact.name
    merged = f"{name}.o"
    made: dict[str, tuple[str, bytes]] = {}
    _call(artefact, target, place, [*_compile_inputs(artefact, target, place), "-r", "-Wl,--strip-debug"], merged)
    whole = localise((place / merged).read_bytes(), is_public(name))
    (place / merged).write_bytes(whole)
    # The shared library is linked in any case: it shows what the static one would lack.
    shared = f"lib{name}.so"
    options = ["-shared", "-s", f"-Wl,-soname,{shared}", "-Wl,--gc-sections", "-Wl,-z,defs", "-Wl,--build-id=none"]
    _call(artefact, target, place, [merged, *options, *LIBRARIES], shared)
    if "so" in parts:
        made["so"] = (shared, (place / shared).read_bytes())
    if "a" in parts:
        static = f"lib{name}.a"
        zig(["ar", "rcsD", static, merged], place, name=name, target=target.spec)
        made["a"] = (static, (place / static).read_bytes())
    return made


def _wasm(artefact: Artefact, target: Target, place: Path) -> bytes:
    name = artefact.name
    exports = [f"{name}_run", f"{name}_workspace_bytes", f"{name}_weights_bytes", "__heap_base"]
    options = [f"-Wl,--export={symbol}" for symbol in exports]
    options += ["-s", "-Wl,--gc-sections", f"-Wl,--stack={_WASM_STACK_BYTES}"]
    inputs = _compile_inputs(artefact, target, place)
    try:
        _call(artefact, target, place, [*inputs, *options, "-Wl,--no-entry"], f"{name}.wasm")
    except LinkFailed as error:
        if "undefined symbol" not in str(error.fields["reason"]):
            raise
        # A function of libm that the compiler's own library lacks, such as erff. WASI's libc has it; building that
        # takes half a minute the first time, so it is not the rule.
        options.append("-mexec-model=reactor")
        _call(artefact, target, place, [*inputs, *options, "-lm"], f"{name}.wasm", triple="wasm32-wasi")
    module = (place / f"{name}.wasm").read_bytes()
    if wanted := wasm_imports(module):
        raise LinkFailed(name=name, target=target.spec, reason=f"the module would import {', '.join(wanted)}")
    return module


def wasm_imports(module: bytes) -> list[str]:
    """What a WebAssembly module asks its host for: `module.name` each; a finished artefact asks for nothing."""

    def number(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = module[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at

    def text(at: int) -> tuple[str, int]:
        length, at = number(at)
        return module[at : at + length].decode(), at + length

    assert module[:8] == b"\0asm\x01\0\0\0", "not a WebAssembly module"
    at = 8
    while at < len(module):
        section, (size, start) = module[at], number(at + 1)
        if section == 2:
            count, at = number(start)
            # Only the first is decoded where there are several: what follows a name depends on what it is.
            owner, at = text(at)
            field, at = text(at)
            return [f"{owner}.{field}", *([f"{count - 1} more"] if count > 1 else [])]
        at = start + size
    return []


def _compile_inputs(artefact: Artefact, target: Target, place: Path) -> list[str]:
    """Put sources, objects and runtime into `place`; the arguments that compile them."""
    runtime = {"runtime.h": (runtime_folder() / "runtime.h").read_bytes()}
    runtime |= {file: (runtime_folder() / file).read_bytes() for file in _RUNTIME[target.kind]}
    own: Mapping[str, bytes] = {file: text.encode() for file, text in artefact.sources.items()}
    for subfolder, files in (("runtime", runtime), ("model", {**own, **artefact.objects})):
        (place / subfolder).mkdir(exist_ok=True)
        for file, content in files.items():
            (place / subfolder / file).write_bytes(content)
    sources = [f"model/{file}" for file in sorted(own) if file.endswith(".c")]
    sources += [f"runtime/{file}" for file in runtime if file.endswith(".c")]
    objects = [f"model/{file}" for file in sorted(artefact.objects)]
    return [*_COMPILE, symbols_of(artefact.name), "-Imodel", "-Iruntime", *sources, *objects]


def _call(
    artefact: Artefact, target: Target, place: Path, arguments: Sequence[str], output: str, triple: str = ""
) -> None:
    machine = ["-target", triple or target.zig, f"-mcpu={target.zig_cpu}"]
    zig(["cc", *machine, *arguments, "-o", output], place, name=artefact.name, target=target.spec)


def _write(file: Path, content: bytes) -> Path:
    # A library that a program has loaded keeps its bytes: the new one is another file, put in its place.
    fresh = file.with_name(f".{file.name}.new")
    try:
        fresh.write_bytes(content)
        fresh.replace(file)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise CannotWrite(file=file, reason=error.strerror or error) from error
    return file
