"""Which part of calibration data something is fitted to, and which says whether that helped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The last of so many batches is held out; of fewer batches the last of so many parts of each.
EVERY = 4


@dataclass(frozen=True)
class Split:
    """Rows of each batch, in two parts. `batches`: how many there are."""

    batches: int

    @property
    def whole(self) -> bool:
        """Whether batches are held out as wholes."""
        return self.batches >= EVERY

    def fitted(self, batch: int, rows: int) -> range:
        """The rows of a batch that are fitted to."""
        if self.whole:
            return range(0 if self._is_held(batch) else rows)
        return range(rows - rows // EVERY)

    def held(self, batch: int, rows: int) -> range:
        """The rows of a batch that are held out; all of them where there are too few."""
        if self.whole:
            return range(rows if self._is_held(batch) else 0)
        return range(rows - rows // EVERY if rows >= EVERY else 0, rows)

    def drawn(self, batch: int, rows: int, most: int) -> tuple[Tensor, Tensor]:
        """Indices of rows that are fitted to, and of such that are held out.

        Over all batches `most` of the first are drawn, by chance but always the same ones, and a quarter as many of the
        others; all where there are no more.
        """
        held = self.batches // EVERY if self.whole else self.batches
        counts = (self.batches - held if self.whole else self.batches), held
        generator = torch.Generator().manual_seed(batch)
        drawn = []
        for own, count, total in zip(
            (self.fitted(batch, rows), self.held(batch, rows)), counts, (most, most // EVERY), strict=True
        ):
            indices, share = torch.arange(own.start, own.stop), -(-total // count)
            if len(indices) > share:
                indices = indices[torch.randperm(len(indices), generator=generator)[:share]]
            drawn.append(indices)
        return drawn[0], drawn[1]

    @staticmethod
    def _is_held(batch: int) -> bool:
        return batch % EVERY == EVERY - 1
