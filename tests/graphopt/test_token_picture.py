"""Pictures of tokens: how images are read, what is dimmed, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from graphopt.errors import BadImage, BadOption, CannotWrite
from graphopt.spec import TensorSpec
from graphopt.token_picture import Panel, dimmed, draw, grid_of, image_input, read_image

PICTURE = TensorSpec("x", (2, 3, 8, 16), "float32")


def saved(folder: Path, mode: str = "RGB") -> Path:
    """A picture of 32 x 16 pixels, the left half black and the right one white."""
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:, 16:] = 255
    Image.fromarray(pixels).convert(mode).save(folder / "x.png")
    return folder / "x.png"


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_an_image_is_resized_and_normalised(tmp_path: Path, mode: str) -> None:
    """To the input's size and type, every sample the same: pixels in [0, 1], minus mean, divided by std."""
    given, picture = read_image(str(saved(tmp_path, mode)), PICTURE, [0.5, 0.25, 0.0], [0.5, 1.0, 2.0])
    assert given.shape == (2, 3, 8, 16)
    assert given.dtype == np.float32
    assert picture.shape == (8, 16, 3)
    assert np.array_equal(given[0], given[1])
    assert given[0, :, 0, 0] == pytest.approx([-1.0, -0.25, 0.0])
    assert given[0, :, 0, -1] == pytest.approx([1.0, 0.75, 0.5])
    grey, shown = read_image(str(tmp_path / "x.png"), TensorSpec("x", (1, 1, 4, 4), "float16"), [0.0], [1.0])
    assert (grey.shape, grey.dtype, shown.shape) == ((1, 1, 4, 4), np.float16, (4, 4, 3))


def test_patches_that_went_are_dimmed() -> None:
    """Towards white, and no other."""
    after = dimmed(np.zeros((4, 4, 3)), np.array([[0, -1], [-1, 1]]))
    assert (after[:2, :2] == 0).all()
    assert (after[2:, 2:] == 0).all()
    assert (after[:2, 2:] == 0.8).all()
    assert (after[2:, :2] == 0.8).all()


def test_the_grid_is_that_of_square_patches() -> None:
    """Unless it is named."""
    assert grid_of(196, 224, 224, None) == (14, 14)
    assert grid_of(32, 8, 16, None) == (4, 8)
    assert grid_of(12, 8, 8, (3, 4)) == (3, 4)
    for grid in (None, (5, 3)):
        with pytest.raises(BadOption, match="the 12 tokens are no grid"):
            grid_of(12, 8, 8, grid)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_picture_is_the_same_bytes(tmp_path: Path, kind: str) -> None:
    """For the kinds that matplotlib can write so; the size grows with the places."""
    panels = [Panel("first", np.array([0, 0, 1, 2])), Panel("then", np.array([0, 0, -1, 1]))]
    files = [tmp_path / f"{n}.{kind}" for n in range(2)]
    for file in files:
        draw(file, np.zeros((8, 8, 3)), panels, (2, 2), "x")
    if kind == "png":
        assert files[0].read_bytes() == files[1].read_bytes()
        draw(files[1], np.zeros((8, 8, 3)), panels[:1], (2, 2), "x")
        assert Image.open(files[0]).width > Image.open(files[1]).width
    assert files[0].stat().st_size > 1000


def test_which_input_is_the_image() -> None:
    """The one that can be; by name where several can."""
    other = TensorSpec("ids", (1, 8), "int64")
    assert image_input("m", [other, PICTURE], None) is PICTURE
    second = TensorSpec("y", (1, 1, 4, 4), "float32")
    assert image_input("m", [second, PICTURE], "y") is second
    for specs, wanted in (([other], None), ([second, PICTURE], None), ([PICTURE], "ids")):
        with pytest.raises(BadOption, match="image"):
            image_input("m", specs, wanted)


def test_what_is_no_picture(tmp_path: Path) -> None:
    """Files that are missing, no picture or cut off, and averages that do not fit."""
    file = saved(tmp_path)
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "short.png").write_bytes(file.read_bytes()[:60])
    for name in ("nothing.png", "text.png", "short.png", "."):
        with pytest.raises(BadImage):
            read_image(str(tmp_path / name), PICTURE, [0.0], [1.0])
    for mean, std in (([0.0, 0.0], [1.0]), ([0.0], [1.0, 1.0]), ([0.0], [0.0])):
        with pytest.raises(BadOption, match=r"--(mean|std)"):
            read_image(str(file), PICTURE, mean, std)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    """Kinds of files that are no pictures."""
    with pytest.raises(CannotWrite, match="no kind of picture"):
        draw(tmp_path / "x.txt", np.zeros((8, 8, 3)), [], (2, 2), "x")
    assert not list(tmp_path.iterdir())
