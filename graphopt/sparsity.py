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

import re
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from graphopt.errors import BadOption

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
        if min(self.rows, self.cols, self.n) < 1 or self.n > self.m:
            raise BadOption(what=f"sparse format {self}", way_out="sizes are from 1, and N is at most M")

    def __str__(self) -> str:
        if self.m > 1:
            return f"{self.rows}:{self.n}:{self.m}" if self.rows > 1 else f"{self.n}:{self.m}"
        return "unstructured" if self.rows == self.cols == 1 else f"{self.rows}x{self.cols}"


UNSTRUCTURED = Format()


def parse_format(text: str) -> Format:
    """The format that a text such as "unstructured", "4x1", "2:4" or "8:2:4" names.

    Raises:
        BadOption: there is no such format.
    """
    if text == "unstructured":
        return UNSTRUCTURED
    found = _TEXT.match(text)
    if found is None:
        raise BadOption(what=f"sparse format {text}", way_out="say unstructured, 4x1 (outputs x inputs), 2:4 or 8:2:4")
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
    return padded.reshape(len(padded) // form.rows, form.rows, -1, form.cols).any((1, 3))


def stored(matrix: np.ndarray, form: Format) -> int:
    """How many elements a kernel multiplies that knows only the format's zeros."""
    kept = blocks_kept(matrix, form)
    heights = np.minimum(form.rows, matrix.shape[0] - np.arange(len(kept)) * form.rows)
    widths = np.minimum(form.cols, matrix.shape[1] - np.arange(kept.shape[1]) * form.cols)
    return int(heights @ kept @ widths)


def conforms(matrix: np.ndarray, form: Format) -> bool:
    """Whether a matrix keeps to the format: N of M hold, and blocks that are kept are nearly all of them full."""
    if form.m > 1:
        kept = blocks_kept(matrix, form)
        whole = kept.shape[1] // form.m * form.m
        groups = kept[:, :whole].reshape(len(kept), -1, form.m)
        if (groups.sum(-1) > form.n).any() or (kept[:, whole:].sum(-1) > form.n).any():
            return False
    nonzero = int(np.count_nonzero(matrix))
    return stored(matrix, form) <= max(nonzero / FULL, nonzero + form.rows * form.cols)


# The least share of elements in kept blocks that are not zero: kept weights are hardly ever zero by chance.
FULL = 0.95
# Formats that are looked for, those first that kernels gain most from; N:M only where no block fits.
BLOCKS = tuple(Format(rows, cols) for rows, cols in ((16, 1), (8, 1), (4, 4), (4, 1), (2, 2), (2, 1), (1, 4), (1, 2)))
PATTERNS = tuple(Format(1, 1, n, m) for n, m in ((1, 2), (1, 4), (2, 4), (1, 8), (2, 8), (4, 8), (1, 16), (2, 16)))
# Fewer zeros than this are no sparsity: a few dead weights.
LEAST_ZEROS = 0.1


def recognise(matrix: np.ndarray) -> Format | None:
    """The format that the zeros of a matrix (outputs, inputs) have; None where there are hardly any.

    The largest blocks that hold; else vectors or elements that are N of M throughout; else unstructured.
    """
    if matrix.size == 0 or 1 - np.count_nonzero(matrix) / matrix.size < LEAST_ZEROS or not matrix.any():
        return None
    block = next((form for form in BLOCKS if conforms(matrix, form)), UNSTRUCTURED)
    if block.cols == 1:
        tight = [Format(block.rows, 1, form.n, form.m) for form in PATTERNS]
        share = np.count_nonzero(matrix) / matrix.size
        for form in tight:
            # N of M by chance has less than N of M kept on the whole.
            if abs(share - form.n / form.m) < 0.02 and conforms(matrix, form):
                return form
    return block
