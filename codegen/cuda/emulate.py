"""The emitted CUDA C itself, compiled for the CPU and run: the functional check where there is no GPU.

`emulation/simt.h` says what is modelled. A kernel without barriers and shuffles runs as a loop over its threads; the
others get a fiber per thread. Timing, memory coalescing and races between warps within one barrier interval are not
modelled, except that the order of threads can be chosen: a kernel is right only if every order gives the same.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from graphopt.codegen.cuda.artefact import CudaArtefact, KernelLaunch
from graphopt.errors import LinkFailed
from graphopt.targets.zig import zig

HEADERS = Path(__file__).parent / "emulation"
FORWARD, REVERSE, SHUFFLED = 0, 1, 2

_KERNEL = re.compile(r'^extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(([^)]*)\) \{$', re.M)
_LINKAGE = 'extern "C" '
_SHARED = re.compile(r"__shared__ (?:alignas\((\d+)\) )?([\w ]+?) (\w+)\[(\d+)\];")
_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) |alignas\(\d+\) )?([\w ]+?) (\w+)\[\];")
_WAITS = re.compile(r"__sync\w+\(|__shfl\w+\(|__activemask\(")
_BYTES = {
    "half": 2, "__half": 2, "half2": 4, "nv_bfloat16": 2, "__nv_bfloat16": 2, "float": 4, "float2": 8, "float4": 16,
    "double": 8, "int": 4, "uint": 4, "unsigned int": 4, "int64_t": 8, "uint64_t": 8, "signed char": 1, "char": 1,
    "uchar": 1, "unsigned char": 1, "bool": 1, "short": 2, "ushort": 2,
}  # fmt: skip


class EmulationFailed(Exception):
    """A kernel broke a rule that every GPU relies on; the message names the kernel, the rule and the source line."""


def host_source(source: str) -> str:
    """CUDA C as C++ for the host, with one C function per kernel.

        int32_t emulated_NAME(const uint32_t geometry[7], void **arguments, uint32_t order)

    geometry: grid x, y, z, block x, y, z and bytes of dynamic shared memory; arguments: pointers to each, as
    cuLaunchKernel takes them. 0, or emulated_error() tells.
    """
    kernels = list(_KERNEL.finditer(source))
    pieces = [source[: kernels[0].start()] if kernels else source]
    calls = []
    for kernel, after in zip(kernels, [*kernels[1:], None], strict=True):
        text = source[kernel.start() : after.start() if after else len(source)]
        text, shared = _place_shared(text)
        # The compiler's messages and the emulator's speak of lines of the CUDA source.
        line = source.count("\n", 0, kernel.start()) + 1
        pieces.append(f'#line {line} "kernels.cu"\n{text.replace(_LINKAGE, "static ", 1)}')
        types = [
            re.sub(r"\b(__restrict__|const)\b", "", p).strip().rsplit(" ", 1)[0] for p in kernel[2].split(",") if p
        ]
        arguments = ", ".join(f"*({t} *)a[{i}]" for i, t in enumerate(types))
        calls.append(
            f"namespace {{ struct body_{kernel[1]} {{\n"
            f"  static void run(void **a) {{ {kernel[1]}({arguments}); }}\n}}; }}\n"
            f'extern "C" int32_t emulated_{kernel[1]}(const uint32_t *geometry, void **a, uint32_t order) {{\n'
            f"  return simt::launch<body_{kernel[1]}>(geometry, {shared}, {str(bool(_WAITS.search(text))).lower()}, "
            "a, order);\n}\n"
        )
    error = 'extern "C" const char *emulated_error(void) { return simt::message; }\n'
    rows = "".join(f'  {{"{kernel[1]}", emulated_{kernel[1]}}},\n' for kernel in kernels)
    table = f'extern "C" const driver::Kernel emulated_kernels[] = {{\n{rows}  {{nullptr, nullptr}}}};\n'
    driver = f'#include "driver.h"\n{table}'
    return "".join(pieces) + "\n" + "".join(calls) + error + driver


def _place_shared(text: str) -> tuple[str, int]:
    """Shared arrays as places in the emulator's pool; also how many bytes they take."""
    top = 0

    def static(match: re.Match[str]) -> str:
        nonlocal top
        alignment, dtype, name, count = int(match[1] or 16), match[2], match[3], int(match[4])
        at = -(-top // alignment) * alignment
        top = at + _BYTES[dtype] * count
        return f"{dtype} *{name} = reinterpret_cast<{dtype} *>(simt::pool + {at});"

    text = _SHARED.sub(static, text)
    if not _DYNAMIC.search(text):
        return text, top
    top = -(-top // 64) * 64
    return _DYNAMIC.sub(rf"\1 *\2 = reinterpret_cast<\1 *>(simt::pool + {top});", text), top


def build(source: str, output: Path) -> None:
    """Compile CUDA C for this machine into the shared library `output`: a driver that knows these kernels.

    It has the functions of `host_source` and those of libcuda.so.1 that the launcher needs (`emulation/driver.h`).
    Only a process that shall not meet a real driver may load it under that name: NVRTC, too, looks for a library so
    named among those that are loaded, and crashes on this one.

    Raises:
        ToolMissing: zig is not installed.
        EmulationFailed: the source uses something that the emulation does not have.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-emulate-") as folder:
        place = Path(folder)
        shutil.copytree(HEADERS, place / "emulation")
        (place / "kernels.cc").write_text(host_source(source), encoding="utf-8")
        arguments = [
            *("cc", "-x", "c++", "-std=c++17", "-O2", "-w", "-mcpu=native"),
            # Contraction as nvcc does it; none of the traps that zig adds by default.
            *("-ffp-contract=fast", "-fno-sanitize=all", "-fno-exceptions", "-fno-rtti", "-fno-strict-aliasing"),
            *("-fno-threadsafe-statics", "-nostdinc++", "-Iemulation", "-include", "simt.h", "-D__CUDA_ARCH__=900"),
            *("-fPIC", "-shared", f"-Wl,-soname,{output.name}", "kernels.cc", "-lm", "-o", "kernels.so"),
        ]
        try:
            zig(arguments, place, name="the kernels", target="the CPU", purpose="check CUDA kernels")
        except LinkFailed as error:
            raise EmulationFailed(f"the kernels do not compile for the CPU: {error.fields['reason']}") from error
        shutil.copyfile(place / "kernels.so", output)


class Emulator:
    """The kernels of one CUDA C text, callable on host memory. Not thread-safe: one block runs at a time."""

    def __init__(self, source: str) -> None:
        """Compile `source`. Raises ToolMissing, EmulationFailed."""
        self._folder = tempfile.TemporaryDirectory(prefix="graphopt-emulate-")
        path = Path(self._folder.name) / "kernels.so"
        build(source, path)
        self._library = ctypes.CDLL(str(path))
        self._library.emulated_error.restype = ctypes.c_char_p

    def launch(self, launch: KernelLaunch, pointers: Sequence[int], order: int = FORWARD) -> None:
        """Run one kernel.

        Args:
            launch: the kernel with its grid, block and dynamic shared memory.
            pointers: addresses of the kernel's arguments, in its order.
            order: of the threads between two barriers: FORWARD, REVERSE, or SHUFFLED and above, the seed of a shuffle.

        Raises:
            EmulationFailed: a barrier that not all threads reach, a shuffle with missing lanes, a write past the end of
                shared memory.
        """
        geometry = (ctypes.c_uint32 * 7)(*launch.grid, *launch.block, launch.dynamic_shared_bytes)
        values = [ctypes.c_void_p(p) for p in pointers]
        array = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        function = getattr(self._library, f"emulated_{launch.kernel}")
        if function(geometry, array, ctypes.c_uint32(order)):
            raise EmulationFailed(f"{launch.kernel}: {self._library.emulated_error().decode()}")

    def run(self, artefact: CudaArtefact, inputs: Sequence[np.ndarray], order: int = FORWARD) -> list[np.ndarray]:
        """Run a whole model on the CPU, with the memory plan and the launches that the library uses on a GPU.

        Args:
            artefact: what `source` was taken from.
            inputs: in the order of the artefact's inputs, with their shapes and dtypes (bfloat16 as any 2-byte type).
            order: as for `launch`.

        Returns:
            Outputs in the artefact's order; bfloat16 ones as uint16.

        Raises:
            EmulationFailed: as for `launch`.
        """
        weights = aligned(len(artefact.weights))
        weights[:] = np.frombuffer(artefact.weights, np.uint8)
        # A value that is read before it is written is NaN, not by luck zero.
        arena = aligned(artefact.workspace_bytes, fill=0xFF)
        ins = [aligned(nbytes) for nbytes in artefact.input_bytes]
        for place, array, spec in zip(ins, inputs, artefact.inputs, strict=True):
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            assert raw.nbytes == place.nbytes, f"{spec.name}: {raw.nbytes} bytes, not {place.nbytes}"
            place[:] = raw
        outs = [aligned(nbytes, fill=0xFF) for nbytes in artefact.output_bytes]
        spaces = {"input": ins, "output": outs, "weight": [weights], "arena": [arena]}
        for launch in artefact.launches:
            pointers = [spaces[a.space][a.index].ctypes.data + a.offset for a in launch.arguments]
            self.launch(launch, pointers, order)
        for copy in artefact.copies:
            source = spaces[copy.source.space][copy.source.index]
            outs[copy.output][:] = source[copy.source.offset :][: outs[copy.output].nbytes]
        dtypes = ["uint16" if spec.dtype == "bfloat16" else spec.dtype for spec in artefact.outputs]
        return [
            out.view(dtype).reshape(spec.shape) for out, dtype, spec in zip(outs, dtypes, artefact.outputs, strict=True)
        ]

    def close(self) -> None:
        """Remove the compiled library; the emulator is not used afterwards."""
        self._folder.cleanup()

    def __enter__(self) -> Emulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def aligned(nbytes: int, fill: int = 0) -> np.ndarray:
    """`nbytes` bytes at a 256-byte boundary, as cuMemAlloc gives."""
    raw = np.full(nbytes + 256, fill, np.uint8)
    return raw[-raw.ctypes.data % 256 :][:nbytes]
