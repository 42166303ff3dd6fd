"""Squares of vectors, transposed in registers."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from graphopt.codegen.kernels.emit import Expr


def transposed(vectors: list[Expr], lanes: int) -> list[Expr]:
    """The columns of a square of `lanes` vectors, as vectors; butterflies of shuffles."""
    distance = lanes // 2
    while distance:
        new: list[Any] = [None] * lanes
        low = [n if not n & distance else lanes + n - distance for n in range(lanes)]
        high = [n + distance if not n & distance else lanes + n for n in range(lanes)]
        for i in range(lanes):
            if not i & distance:
                pair = [vectors[i], vectors[i + distance]]
                for at, places in ((i, low), (i + distance, high)):
                    new[at] = T.Bind(tirx.Shuffle(pair, [tirx.IntImm("int32", n) for n in places]))
        vectors = new
        distance //= 2
    return vectors
