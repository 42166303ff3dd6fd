"""A picture of where the tokens of an image go: a panel for each place, what stays as it is and what went dimmed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.arrays import Array, numpy_dtype
from graphopt.errors import BadImage, BadOption, CannotWrite, ToolMissing
from graphopt.spec import TensorSpec

_DIMMED = 0.2
_GREY, _PATCH = 0.7, 16  # of a picture of nothing: its colour, and the pixels of a side of a patch
_INSTALL = "install it: pip install 'graphopt[report]'"


@dataclass(frozen=True)
class Panel:
    """One place: its title, and for each patch, row by row, the token that it is a part of, -1 where it was dropped."""

    title: str
    part_of: Array


def image_input(name: str, inputs: Sequence[TensorSpec], wanted: str | None) -> TensorSpec:
    """The input that an image goes into: of the name that is `wanted`, else the one that is (b, c, h, w) and floating.

    Raises:
        BadOption: there is none, or more than one.
    """
    images = [s for s in inputs if len(s.shape) == 4 and s.shape[1] in (1, 3) and s.dtype.startswith("float")]
    found = [spec for spec in images if wanted in (None, spec.name)]
    if len(found) != 1:
        takes = ", ".join(map(str, inputs)) or "no inputs"
        what = (
            f"{wanted}: no input of {name} is an image of that name" if wanted else f"{name}: which input is an image"
        )
        raise BadOption(
            what=f"{what}; it takes {takes}", way_out="an image is (b, 1 or 3, h, w); name it: --image NAME=FILE"
        )
    return found[0]


def read_image(file: str, spec: TensorSpec, mean: Sequence[float], std: Sequence[float]) -> tuple[Array, Array]:
    """An image as a model wants it, and as people do: resized to the input, in [0, 1], minus mean, divided by std.

    Returns:
        (b, c, h, w) of the input's dtype, every sample the same; (h, w, 3) in [0, 1].

    Raises:
        BadImage: the file is missing or no picture.
        BadOption: mean or std are not as many as the input has channels.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ToolMissing(tool="Pillow", purpose="read an image", install=_INSTALL) from error
    batch, channels, height, width = spec.shape
    for option, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise BadOption(
                what=f"--{option}: {len(values)} numbers for {channels} channels", way_out=f"give 1 or {channels}"
            )
    if min(std) <= 0:
        raise BadOption(what=f"--std: {min(std):g}", way_out="give numbers above 0")
    try:
        with Image.open(file) as opened:
            picture = opened.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BICUBIC)
    except UnidentifiedImageError as error:
        raise BadImage(file=file, reason="is no picture that Pillow reads") from error
    except (OSError, Image.DecompressionBombError) as error:
        raise BadImage(file=file, reason=getattr(error, "strerror", None) or str(error)) from error
    pixels = np.asarray(picture, np.float32).reshape(height, width, channels) / 255
    scaled = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    given = np.repeat(scaled.transpose(2, 0, 1)[None], batch, 0).astype(numpy_dtype(spec.dtype))
    return given, np.broadcast_to(pixels, (height, width, 3))


def grid_of(tokens: int, height: int, width: int, given: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of the patches: as given, else those of square patches. Raises BadOption."""
    rows, columns = given or (0, 0)
    if given is None:
        rows = round(math.sqrt(tokens * height / width))
        columns = tokens // max(rows, 1)
    square = given is not None or rows * width == columns * height
    if rows * columns != tokens or not square:
        raise BadOption(
            what=f"the {tokens} tokens are no grid of {f'{rows} x {columns}' if given else 'square'} patches",
            way_out=f"name the grid: --grid ROWSxCOLUMNS, which make {tokens}",
        )
    return rows, columns


def blank(grid: tuple[int, int]) -> Array:
    """A grey picture to draw a grid of patches on, (h, w, 3), where no image is known."""
    return np.full((grid[0] * _PATCH, grid[1] * _PATCH, 3), _GREY, np.float32)


def draw(file: Path, picture: Array, panels: Sequence[Panel], grid: tuple[int, int], title: str) -> None:
    """Write the picture: the image, then a panel for each place, and around merged patches a line of their own colour.

    Raises:
        CannotWrite: the file system refuses, or there is no such kind of file.
        ToolMissing: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ToolMissing(tool="matplotlib", purpose="draw", install=_INSTALL) from error
    from graphopt.program import write_whole

    columns = min(len(panels) + 1, 4)
    lines = math.ceil((len(panels) + 1) / columns)
    figure = Figure(figsize=(2.6 * columns, 2.9 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    figure.suptitle(title, fontsize=10)
    for place, panel in zip(axes, [None, *panels, *[None] * (lines * columns)], strict=False):
        place.set_axis_off()
        if panel is not None:
            place.imshow(dimmed(picture, panel.part_of.reshape(grid)), interpolation="nearest")
            place.set_title(panel.title, fontsize=9)
            _outline(place, panel.part_of.reshape(grid), picture.shape[:2])
    first = figure.axes[0]
    first.imshow(picture, interpolation="nearest")
    first.set_title("image", fontsize=9)
    kind = file.suffix.lstrip(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise CannotWrite(file=file, reason=f"{file.suffix or 'no suffix'} is no kind of picture; write a .png")
    write_whole(os.fspath(file), lambda stream: figure.savefig(stream, format=kind, dpi=120, metadata=_metadata(kind)))


def dimmed(picture: Array, part_of: Array) -> Array:
    """The picture (h, w, 3), towards white where a patch of the grid was dropped."""
    height, width = picture.shape[:2]
    down = np.arange(height) * part_of.shape[0] // height
    across = np.arange(width) * part_of.shape[1] // width
    gone = (part_of < 0)[down][:, across, None]
    return np.where(gone, 1 - _DIMMED * (1 - picture), picture)


def _outline(place: Any, part_of: Array, size: tuple[int, int]) -> None:
    """Lines where a patch that was merged with others meets one that it was not merged with."""
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    rows, columns = part_of.shape
    high, wide = size[0] / rows, size[1] / columns
    counts = np.bincount(part_of[part_of >= 0])
    colours = colormaps["tab20"]
    segments, edges = [], []
    for row, column in np.ndindex(rows, columns):
        own = int(part_of[row, column])
        if own < 0 or counts[own] < 2:
            continue
        # Just inside of the patch, so that two groups side by side both show.
        left, right = column * wide - 0.5 + 0.06 * wide, (column + 1) * wide - 0.5 - 0.06 * wide
        top, bottom = row * high - 0.5 + 0.06 * high, (row + 1) * high - 0.5 - 0.06 * high
        sides = {
            (row - 1, column): ((left, top), (right, top)),
            (row + 1, column): ((left, bottom), (right, bottom)),
            (row, column - 1): ((left, top), (left, bottom)),
            (row, column + 1): ((right, top), (right, bottom)),
        }
        for (beside, along), line in sides.items():
            if not (0 <= beside < rows and 0 <= along < columns) or part_of[beside, along] != own:
                segments.append(line)
                edges.append(colours(own % 20))
    place.add_collection(LineCollection(segments, colors=edges, linewidths=1.3))


def _metadata(kind: str) -> dict[str, Any]:
    """No times or versions in it: the same picture is the same bytes."""
    return {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
