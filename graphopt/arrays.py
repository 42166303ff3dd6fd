"""Tensors of any kind to dense numpy arrays that fit a program's inputs, and the files that hold them."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import BadSample, SampleNotFound, WrongInputs
from graphopt.spec import TensorSpec

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, np.dtype[Any]]
Note = Callable[[str], None]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype for "float32", "bfloat16", ...; bfloat16 comes from ml_dtypes, which TVM brings along."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def to_numpy(value: Any) -> Array:
    """A numpy array of a torch tensor (on any device), an array, or nested lists of numbers."""
    torch = sys.modules.get("torch")  # who passes a torch tensor has imported it
    if torch is not None and isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
        return tensor.numpy()
    return np.asarray(value)


def to_torch(array: Array, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of its own with the array's values; the inverse of `to_numpy`."""
    import torch

    copied = np.array(array, order="C")
    if dtype == torch.bfloat16 and copied.dtype == numpy_dtype("bfloat16"):
        return torch.from_numpy(copied.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copied).to(dtype)


def fit_inputs(
    name: str, specs: Sequence[TensorSpec], given: Mapping[str, Any], note: Note | None = None
) -> list[Array]:
    """Dense arrays in the order of `specs`.

    A dtype that every value survives (int32 to int64, float16 to float32) is converted, and `note` hears about it;
    any other difference is refused, since it would change what is computed.

    Raises:
        WrongInputs: a name, shape or dtype does not fit; the message says which, and what is wanted.
    """

    def wrong(what: str) -> WrongInputs:
        return WrongInputs(model=name, what=what, expected=", ".join(map(str, specs)) or "no inputs")

    known = [spec.name for spec in specs]
    if missing := [key for key in known if key not in given]:
        raise wrong(f"no tensor for {', '.join(missing)}")
    if unknown := [key for key in given if key not in known]:
        raise wrong(f"it has no input {', '.join(unknown)}")
    arrays = []
    for spec in specs:
        array = to_numpy(given[spec.name])
        if array.shape != spec.shape:
            raise wrong(f"{spec.name} has shape {list(array.shape)}, wants {list(spec.shape)}")
        want = numpy_dtype(spec.dtype)
        if array.dtype != want:
            if not is_safe(array.dtype, want):
                raise wrong(f"{spec.name} is {array.dtype}, wants {spec.dtype}; converting would lose values")
            if note is not None:
                note(f"{spec.name}: {array.dtype} converted to {spec.dtype}, which keeps every value")
        # Byte order is part of the dtype for numpy, and for the artefact too.
        arrays.append(np.ascontiguousarray(array, dtype=want).reshape(spec.shape))
    return arrays


def is_safe(have: np.dtype[Any], want: np.dtype[Any]) -> bool:
    """Whether every value of the one dtype is one of the other's."""
    if have.kind not in "biufV" or want.kind not in "biufV":
        return False
    return bool(np.can_cast(have, want, casting="safe"))


def read_arrays(file: str | os.PathLike[str]) -> Array | dict[str, Array]:
    """What a .npy file (one array) or a .npz file (arrays by name) holds. Nothing is unpickled.

    Raises:
        BadSample: the file is damaged, or no numpy file.
        SampleNotFound: it is missing or may not be read.
    """
    path = Path(file)
    if path.is_dir():
        raise BadSample(file=file, what="is a folder, not a .npy or .npz file")
    try:
        return _read(path)
    except OSError as error:
        raise SampleNotFound(file=file, reason=error.strerror or error) from error


def _read(file: Path) -> Array | dict[str, Array]:
    with file.open("rb") as stream:
        head = stream.read(6)
        try:
            if head.startswith((b"\x93NUMPY", b"PK")):
                stream.seek(0)
                content = np.load(stream, allow_pickle=False)
                if isinstance(content, np.ndarray):
                    return content
                with content:
                    return {name: content[name] for name in content.files}
        except (ValueError, EOFError, zipfile.BadZipFile, KeyError, NotImplementedError, MemoryError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadSample(file=file, what=f"is truncated or damaged: {reason}") from error
    raise BadSample(file=file, what="is empty" if not head else "is not a .npy or .npz file")
