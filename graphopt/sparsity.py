"""Sparse formats of weights: which zeros a kernel may count on.

A weight is seen as a matrix (outputs, inputs); of a convolution the inputs are taps with their channels, channels
fastest. The values stay an ordinary tensor with zeros in it, so that the program runs in PyTorch as it is.

    unstructured   any element may be zero
    4x1            blocks of 4 outputs x 1 input are zero as a whole
    2:4            of 4 consecutive inputs of an output at most 2 are kept
    8:2:4          vector-wise: of 4 consecutive columns at most 2 are kept, the same ones in each of 8 outputs
Source: Elsen et al., "Fast Sparse ConvNets", CVPR 2020, arXiv:1911.09723 (blocks); Mishra et al., "Accelerating Sparse
Deep Neural Networks", arXiv:2104.08378 (N:M); Castro et al., "VENOM", SC 2023, arXiv:2310.02065 (V:N:M; differs: the N
columns are chosen directly, not 2 of 4 preselected ones).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from graphopt.arrays import to_numpy
from graphopt.errors import BadOption

# The largest size of a block, and of M.
MOST = 1 << 16
_TEXT = re.compile(r"(?:(\d+)x(\d+)|(?:(\d+):)?(\d+):(\d+))\Z")


@dataclass(frozen=True)
class Format:
    """Blocks of `rows` outputs x `cols` inputs, kept or zero as a whole; of each `m` consecutive ones along the inputs
    at most `n` kept (`m` = 1: any number).

    Blocks start at multiples of their size; the last ones of a matrix may be smaller.
    """

    rows: int = 1
    cols: int = 1
    n: int = 1
    m: int = 1

    def __post_init__(self) -> None:
        sizes = (self.rows, self.cols, self.n, self.m)
        if min(sizes) < 1 or max(sizes) > MOST or self.n > self.m:
            what = f"there is no sparse format of blocks of {self.rows} x {self.cols}, {self.n} of {self.m} kept"
            raise BadOption(what=what, way_out=f"sizes are from 1 to {MOST}, and N is at most M")

    def __str__(self) -> str:
        if self.m > 1:
            return f"{self.rows}:{self.n}:{self.m}" if self.rows > 1 else f"{self.n}:{self.m}"
        return "unstructured" if self.rows == self.cols == 1 else f"{self.rows}x{self.cols}"


UNSTRUCTURED = Format()
# The word for a tensor that no sparse kernel shall take, whatever zeros it has.
DENSE = "dense"


@dataclass(frozen=True)
class Annotation:
    """What a Program says of the zeros of a weight.

    `density` is the share of its elements that are not zero, `stored` the share that a kernel multiplies that knows
    only the format: more than `density` where kept blocks have zeros in them, 1 for a tensor that is to be taken as
    dense (`format` is None).
    """

    format: Format | None
    density: float
    stored: float

    @property
    def word(self) -> str:
        """The format as `parse_annotation` takes it."""
        return DENSE if self.format is None else str(self.format)

    def __str__(self) -> str:
        more = f", {self.stored:.1%} stored" if self.format is not None and self.stored != self.density else ""
        return f"{self.word}, {self.density:.1%} kept{more}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"format": self.word, "density": self.density, "stored": self.stored}


def parse_annotation(text: str) -> Format | None:
    """A format, or None for "dense". Raises BadOption where the text is neither."""
    return None if text == DENSE else parse_format(text, or_else=", or dense: no sparse kernel shall be used")


def parse_format(text: str, *, or_else: str = "") -> Format:
    """The format that a text such as "unstructured", "4x1", "2:4" or "8:2:4" names; `or_else` is what else may be said.

    Raises:
        BadOption: there is no such format.
    """
    if text == "unstructured":
        return UNSTRUCTURED
    found = _TEXT.match(text)
    if found is None:
        raise BadOption(
            what=f"there is no sparse format {text}",
            way_out=f"say unstructured, 4x1 (outputs x inputs), 2:4, 8:2:4{or_else}",
        )
    rows, cols, vector, n, m = (int(part) if part else 1 for part in found.groups())
    return Format(rows, cols) if found[1] else Format(vector, 1, n, m)


def as_matrix(weight: np.ndarray, outputs_last: bool = False) -> np.ndarray:
    """A weight as (outputs, inputs): OI or, with `outputs_last`, IO of a linear layer, OI* of a convolution."""
    if outputs_last:
        return np.moveaxis(weight, -1, 0).reshape(weight.shape[-1], -1)
    return np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1)


def blocks_kept(matrix: np.ndarray | Tensor, form: Format) -> np.ndarray:
    """Which blocks of a matrix have an element that is not zero: (ceil(outputs / rows), ceil(inputs / cols)), bool."""
    kept = np.asarray(matrix) != 0
    outputs, inputs = kept.shape
    padded = np.zeros((-(-outputs // form.rows) * form.rows, -(-inputs // form.cols) * form.cols), bool)
    padded[:outputs, :inputs] = kept
    # A block's rows and columns one after another: numpy is slow at reducing short axes.
    whole = padded[:: form.rows].copy()
    for row in range(1, form.rows):
        whole |= padded[row :: form.rows]
    blocks = whole[:, :: form.cols].copy()
    for column in range(1, form.cols):
        blocks |= whole[:, column :: form.cols]
    return blocks


def stored(matrix: np.ndarray, form: Format) -> int:
    """How many elements a kernel multiplies that knows only the format's zeros."""
    kept = blocks_kept(matrix, form)
    heights = np.minimum(form.rows, matrix.shape[0] - np.arange(len(kept)) * form.rows)
    widths = np.minimum(form.cols, matrix.shape[1] - np.arange(kept.shape[1]) * form.cols)
    return int(heights @ kept @ widths)


def conforms(matrix: np.ndarray, form: Format) -> bool:
    """Whether a matrix keeps to the format: N of M hold, and blocks that are kept are nearly all of them full."""
    if form.m > 1 and _crowded(matrix, form).any():
        return False
    nonzero = int(np.count_nonzero(matrix))
    return stored(matrix, form) <= max(nonzero / FULL, nonzero + form.rows * form.cols)


def _crowded(matrix: np.ndarray, form: Format) -> np.ndarray:
    """(rows of blocks, groups of M columns), bool: where more than N are kept; the last group may be smaller."""
    kept = blocks_kept(matrix, form)
    count = np.zeros((len(kept), -(-kept.shape[1] // form.m)), np.int32)
    for column in range(min(form.m, kept.shape[1])):
        part = kept[:, column :: form.m]
        count[:, : part.shape[1]] += part
    return count > form.n


def offence(matrix: np.ndarray, form: Format) -> tuple[int, int, str] | None:
    """Row, column and what is wrong there, where a matrix does not keep to the format; None where it does."""
    if conforms(matrix, form):
        return None
    kept = blocks_kept(matrix, form)
    if form.m > 1 and (crowded := _crowded(matrix, form)).any():
        row, group = map(int, np.argwhere(crowded)[0])
        columns = np.flatnonzero(kept[row, group * form.m : (group + 1) * form.m]) + group * form.m
        column = int(columns[form.n])
        first = int(np.flatnonzero(matrix[row * form.rows : (row + 1) * form.rows, column])[0])
        found = f"{len(columns)} of columns {group * form.m} to {min((group + 1) * form.m, kept.shape[1]) - 1} are kept"
        return row * form.rows + first, column, found
    full = kept.repeat(form.rows, 0)[: len(matrix)].repeat(form.cols, 1)[:, : matrix.shape[1]]
    row, column = map(int, np.argwhere(full & (np.asarray(matrix) == 0))[0])
    share = np.count_nonzero(matrix) / int(full.sum())
    return row, column, f"a zero in a block that is kept; only {share:.1%} of the elements of such blocks are not zero"


# The least share of elements in kept blocks that are not zero: kept weights are hardly ever zero by chance.
FULL = 0.95
# Formats that are looked for, those first that kernels gain most from; N:M only where no block fits.
BLOCKS = tuple(Format(rows, cols) for rows, cols in ((16, 1), (8, 1), (4, 4), (4, 1), (2, 2), (2, 1), (1, 4), (1, 2)))
PATTERNS = tuple(Format(1, 1, n, m) for n, m in ((1, 2), (1, 4), (2, 4), (1, 8), (2, 8), (4, 8), (1, 16), (2, 16)))
# Fewer zeros than this are no sparsity: a few dead weights.
LEAST_ZEROS = 0.1


def recognise(matrix: np.ndarray, outputs: int = 0) -> Format | None:
    """The format that the zeros of a matrix (outputs, inputs) have; None where there are hardly any, or nothing else.

    The largest blocks that hold; else vectors or elements that are N of M throughout; else unstructured.

    Args:
        matrix: values, or True where they are not zero.
        outputs: of a convolution in groups, the outputs of one: no block reaches over two groups.
    """
    share = np.count_nonzero(matrix) / max(1, matrix.size)
    if share == 0 or 1 - share < LEAST_ZEROS:
        return None
    if matrix.dtype != bool and not np.isfinite(matrix).all():
        return None  # what comes out may be NaN, which the zeros of later layers would have to meet
    # Larger blocks hold only where pairs do, which are quick to look at. The largest have 16 elements; see `conforms`.
    most = max(np.count_nonzero(matrix) / FULL, np.count_nonzero(matrix) + 16)
    rows, cols = (stored(matrix, pair) <= most for pair in (Format(2, 1), Format(1, 2)))
    blocks = [
        form for form in BLOCKS if outputs % form.rows == 0 and (rows or form.rows == 1) and (cols or form.cols == 1)
    ]
    block = next((form for form in blocks if conforms(matrix, form)), UNSTRUCTURED)
    if block.cols == 1:
        columns = matrix.shape[1]
        for pattern in PATTERNS:
            form = Format(block.rows, 1, pattern.n, pattern.m)
            full = (columns // form.m * form.n + min(form.n, columns % form.m)) / columns
            # N of M by chance has less than N of M kept on the whole.
            if abs(share - full) < 0.02 and conforms(matrix, form):
                return form
    return block


def fingerprint(array: np.ndarray | Tensor) -> str:
    """A hash of how many elements an array has, and of the absolute values of those that are not zero, in any order.

    The same for a tensor and for a copy of it that was transposed, reshaped, reordered or stored in a wider dtype.
    """
    values = to_numpy(array)
    kept = np.sort(np.abs(values[values != 0].astype(np.float64)))
    return hashlib.sha256(f"{values.size}:".encode() + kept.tobytes()).hexdigest()
