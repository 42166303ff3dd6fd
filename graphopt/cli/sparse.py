"""The table of layers whose weights have zeros: what was weighed when they were compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_sparse(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A row for each of a manifest's `sparse_weights`."""
    from rich.markup import escape
    from rich.table import Table

    # Manifests from before kernels were timed have no such fields.
    measured = any(row.get(_MEASURED.format(side)) is not None for row in rows for side in _SIDES)
    times = ("{}_us", _MEASURED) if measured else ("{}_us",)
    headings = [f"{side} us{', measured' if key == _MEASURED else ''}" for key in times for side in _SIDES]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("sparse weight", "layer", "format"):
        table.add_column(heading, overflow="fold")
    for heading in ("kept", *headings):
        table.add_column(heading, justify="right", no_wrap=len(heading) < 10)
    for heading in ("kernel", "why"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        own = (_us(row.get(key.format(side))) for key in times for side in _SIDES)
        kernel = "sparse" if row["picked"] else "dense"
        cells = (row["weight"], row["operator"], row["format"] or "-", f"{row['density']:.1%}", *own)
        table.add_row(*(escape(cell) for cell in (*cells, kernel, row["reason"])))
    console.print(table)
    picked = sum(row["picked"] for row in rows)
    us = "us: for one thread, estimated and as measured" if measured else "us: estimates for one thread"
    console.print(f"sparse kernels for {picked} of {len(rows)}; {us}", markup=False)


_SIDES = ("dense", "sparse")
_MEASURED = "{}_measured_us"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
