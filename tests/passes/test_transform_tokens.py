"""Token Transforming equals its formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.passes.tokens import reference
from tests.passes.tokens.vision import after, image_of, model_of

CASES: list[tuple[dict[str, Any], tuple[float, float]]] = [
    ({"counts": (10, 7, 5)}, (0.1, 0.95)),
    ({"counts": (8, 4, 4), "reducer": "transform:tau=0.5,spread=0.3"}, (0.5, 0.3)),
]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("options", "settings"), CASES)
def test_transform_tokens_equals_its_formulas(
    options: dict[str, Any], settings: tuple[float, float], batch: int
) -> None:
    """Centres, shares and sizes over three blocks, with proportional attention."""
    model, x = model_of(3), image_of(4, batch)
    with torch.no_grad():
        wanted = reference.reduced(model, x, reference.transform(list(options["counts"]), *settings))
    got = after(model, x, "transform-tokens", sites=(0, 1, 2), **options)[1]
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
