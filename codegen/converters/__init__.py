"""Operators of exported graphs that TVM's importer lacks, or takes in fewer spellings than PyTorch has.

Each takes an fx node and the importer, emits Relax, and returns the value. Arguments are read by the names in the
operator's schema, so a keyword and a position are the same.
"""

from __future__ import annotations

from graphopt.codegen.converters import arithmetic, attention, experts, images, indexing, ordering, rows
from graphopt.codegen.converters.common import Converter

CONVERTERS: dict[str, Converter] = {
    **arithmetic.TABLE,
    **attention.TABLE,
    **experts.TABLE,
    **images.TABLE,
    **indexing.TABLE,
    **ordering.TABLE,
    **rows.TABLE,
}

__all__ = ["CONVERTERS", "Converter"]
