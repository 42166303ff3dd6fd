"""Functions that `module:function` names, as users write them."""

from __future__ import annotations

import torch


def batches():
    """A generator without end."""
    while True:
        yield torch.ones(2, 3)


def nothing() -> None:
    """Forgot to return."""


def breaks():
    """Yields one batch and then goes wrong."""
    yield torch.ones(2, 3)
    raise KeyError("image_7")
