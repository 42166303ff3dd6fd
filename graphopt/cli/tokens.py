"""What `graphopt inspect --tokens` shows: the sequences of tokens that passes may reduce, and the blocks of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.program import Program


def streams_of(program: Program) -> dict[str, Any]:
    """The streams of a program, as passes find them, and the attention that belongs to none.

    Of each stream: its number, how many tokens it has, those that may go where the user names none (or why that cannot
    be told, and the way out), and its blocks by their numbers.
    """
    from graphopt.axes import infer
    from graphopt.edit import Edit
    from graphopt.errors import BadOption
    from graphopt.passes import PREPARE
    from graphopt.passes.base import run_passes
    from graphopt.passes.tokens.protect import span_of
    from graphopt.passes.tokens.sites import blocks, length, sites, streams

    program = run_passes(program, PREPARE, check=False)
    axes, edit = infer(program), Edit(program)
    found, declined = blocks(edit, axes)
    rows = []
    for number, stream in enumerate(streams(edit, found) if found else []):
        first = sites(stream, "attention")[0]
        row = {"stream": number, "tokens": length(stream), "blocks": [block.name for block in stream]}
        try:
            span = span_of(axes, first, None, first)
            rows.append(row | {"may_go": f"{span.start}:{span.stop}", "why_not": ""})
        except BadOption as problem:
            rows.append(row | {"may_go": None, "why_not": f"{problem.args[0]}: {problem.way_out}"})
    others = [{"where": each.where, "reason": each.reason} for each in declined]
    return {"name": program.name, "streams": rows, "declined": others}


def print_streams(console: Console, found: dict[str, Any]) -> None:
    """A line for each stream and each of its blocks."""
    if not found["streams"]:
        console.print(f"{found['name']}: there is no attention in a residual block, so no sequence of tokens")
    for row in found["streams"]:
        may = row["why_not"] or f"{row['may_go']} may go where tokens= names none"
        console.print(
            f"stream {row['stream']}: {row['tokens']} tokens in front of its first block; {may}", markup=False
        )
        for number, name in enumerate(row["blocks"]):
            console.print(f"  block {number:<3} {name}", markup=False)
    for each in found["declined"]:
        console.print(f"left alone: {each['where']}: {each['reason']}", markup=False)
