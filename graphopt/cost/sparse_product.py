"""What zeros in a weight save of the estimated time of its layer.

A kept element takes what one of a dense product does, and more where blocks are low: its offset is read for fewer
multiply-adds. The numbers are round ones from 1x1 convolutions on Zen 4 and Zen 5 at 60 to 90 % zeros. Code generation
has a finer estimate of each kernel, knows what layouts cost, and takes the dense one where zeros do not pay.
"""

from __future__ import annotations

# The time of a kept element over that of one in a dense product, by the outputs of a block.
_BY_ROWS = ((1, 2.2), (2, 1.3), (4, 1.1), (8, 1.0))


def sparse_seconds(dense: float, stored: float, rows: int) -> float:
    """Seconds of a layer.

    Args:
        dense: its seconds without zeros.
        stored: the share of its weight in blocks that are kept.
        rows: outputs of a block.
    """
    each = next(factor for height, factor in reversed(_BY_ROWS) if rows >= height)
    return dense * min(1.0, stored * each)
