"""Which tokens may go, and which never: class tokens, what is selected by its place, text."""

from __future__ import annotations

import re

from graphopt.axes import Axes, results_of
from graphopt.axes.axis import parts
from graphopt.edit import Edit
from graphopt.errors import BadOption
from graphopt.passes.tokens.sites import Site
from graphopt.region import Span


def span_of(edit: Edit, axes: Axes, site: Site, given: str | None) -> Span:
    """The tokens that may go at a place.

    Where the user does not say: all behind the last one in front that stands alone in the program (a class token that
    is put in front of the patches, or taken out by the head).

    Raises:
        BadOption: `given` is no START:STOP of these tokens.
    """
    size = int(site.at.meta["val"].shape[site.dim])
    if given is not None:
        found = re.fullmatch(r"(\d*):(-?\d*)", given.strip())
        start = int(found[1] or 0) if found else 0
        stop = int(found[2] or size) if found else 0
        stop = stop + size if stop < 0 else stop
        if not 0 <= start < stop <= size:
            raise BadOption(what=f"tokens={given} of {size}", way_out="give START:STOP, such as 1: or 5:581")
        return Span(site.dim, start, stop)
    node = next(each for each in axes.program.graph.nodes if each.name == site.at.name)
    start = 0
    segments = parts(results_of(axes.dims[node])[0][site.dim], "sum")
    if len(segments) > 1:
        for segment in segments:
            if segment.extent > 2 or start + segment.extent >= size // 2:
                break
            start += segment.extent
    return Span(site.dim, start, size)
