"""One run of a CUDA library, as a process: LIBRARY NAME WEIGHTS WORKSPACE_BYTES WEIGHTS_BYTES FOLDER INPUTS BYTES...

Reads FOLDER/in0, in1, ..., writes FOLDER/out0, ... of the given sizes. Needs the standard library only. What the
library says of an error goes to standard error, with exit status 1; its sizes of workspace and weights where they are
not those given, with 3.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Run once; the exit status."""
    library_path, name, weights_path, workspace_bytes, weights_bytes, folder, count, *sizes = arguments
    library = ctypes.CDLL(library_path)
    load, run, unload, error = (library[f"{name}_{f}"] for f in ("load", "run", "unload", "error"))
    load.restype, load.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int32]
    run.restype, run.argtypes = ctypes.c_int32, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    unload.restype, unload.argtypes = None, [ctypes.c_void_p]
    error.restype = ctypes.c_char_p
    place = Path(folder)
    own = [library[f"{name}_{what}_bytes"] for what in ("workspace", "weights")]
    for size in own:
        size.restype = ctypes.c_size_t
    if [size() for size in own] != [int(workspace_bytes), int(weights_bytes)]:
        print(*(size() for size in own), file=sys.stderr)
        return 3
    weights = Path(weights_path).read_bytes()
    if len(weights) != int(weights_bytes):
        print(f"{weights_path} has {len(weights)} bytes, not {weights_bytes}", file=sys.stderr)
        return 1
    context = load(weights, 0)
    if not context:
        print(error().decode(), file=sys.stderr)
        return 1
    inputs = [ctypes.create_string_buffer(data, len(data)) for data in _read(place, int(count))]
    outputs = [ctypes.create_string_buffer(int(size)) for size in sizes]
    arrays = [(ctypes.c_void_p * len(b))(*(ctypes.addressof(x) for x in b)) for b in (inputs, outputs)]
    status = run(context, *arrays)
    message = error().decode()
    unload(context)
    if status != 0:
        print(f"{message} (status {status})", file=sys.stderr)
        return 1
    for i, output in enumerate(outputs):
        (place / f"out{i}").write_bytes(output.raw)
    return 0


def _read(place: Path, count: int) -> list[bytes]:
    return [(place / f"in{i}").read_bytes() for i in range(count)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
