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

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("sparse weight", "layer", "format"):
        table.add_column(heading, overflow="fold")
    for heading in ("kept", "dense us", "sparse us"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("kernel", "why"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        estimates = (_us(row[f"{side}_us"]) for side in ("dense", "sparse"))
        kernel = "sparse" if row["picked"] else "dense"
        cells = (row["weight"], row["operator"], row["format"] or "-", f"{row['density']:.1%}", *estimates)
        table.add_row(*(escape(cell) for cell in (*cells, kernel, row["reason"])))
    console.print(table)
    picked = sum(row["picked"] for row in rows)
    console.print(f"sparse kernels for {picked} of {len(rows)}; us: estimates for one thread", markup=False)


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
