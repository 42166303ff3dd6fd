"""The models that are compared, and zeros in their weights: whole blocks at random, the same in every process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from graphopt.sparsity import Format, parse_format
from tests.models import ZOO, build

Built = tuple[nn.Module, dict[str, Tensor]]

# Which weights get zeros, by module name and kind of module.
CHOSEN: dict[str, tuple[str, str]] = {
    "mobilenet_v1": (r"features\.", "1x1"),
    "mobilenet_v2": (r"features\.", "1x1"),
    "resnet50": (r"stages\.", "conv"),
    "deit_s": (r"blocks\.", "linear"),
    "minilm": (r"encoder\.", "linear"),
}
# Weights that get zeros as well for an engine that counts them: XNNPACK runs sparse where two thirds of all weights are
# zero, and the classifier of a MobileNet is a third of them.
FAVOUR = {"mobilenet_v1": "classifier", "mobilenet_v2": "classifier"}
MODELS = tuple(CHOSEN)
FORMATS = ("unstructured", "2x1", "4x1", "8x1", "16x1", "2:4")
ZEROS = (0, 50, 70, 80, 90, 95)  # percent


def chain(width: int, pixels: int, count: int) -> Built:
    """`count` 1x1 convolutions from `width` to `width` channels, each with ReLU, on an image of `pixels`.

    What one of them takes is the difference of two chains, so that what happens at their ends does not count.
    """
    height = max(h for h in range(1, int(pixels**0.5) + 1) if pixels % h == 0)
    shape = (1, width, height, pixels // height)
    inputs = {"input": torch.randn(shape, generator=torch.Generator().manual_seed(2))}
    layers = (layer for _ in range(count) for layer in (nn.Conv2d(width, width, 1), nn.ReLU()))
    return build(lambda: nn.Sequential(*layers), lambda: inputs)


def load(model: str, folder: Path) -> Built:
    """A model at full size with its inputs; MiniLM with its own weights, the others with random ones.

    A name such as "chain-512x196-5" is a `chain` of five.

    Raises:
        ModuleNotFoundError: what holds MiniLM's weights is not installed.
    """
    if found := re.fullmatch(r"chain-(\d+)x(\d+)-(\d+)", model):
        width, pixels, count = map(int, found.groups())
        return chain(width, pixels, count)
    if model != "minilm":
        return ZOO[model]()
    from tests.hf_models import minilm

    module, batches = minilm(folder / "minilm")
    return module, batches[0]


def chosen(model: str, module: nn.Module, favour: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose weights get zeros, with their names; those of FAVOUR at the end."""
    pattern, kind = CHOSEN.get(model, (r"\d", "conv"))
    for name, child in module.named_modules():
        is_conv = isinstance(child, nn.Conv2d) and child.groups == 1
        fits = {
            "linear": isinstance(child, nn.Linear),
            "conv": is_conv,
            "1x1": is_conv and child.kernel_size == (1, 1),
        }
        if fits[kind] and re.match(pattern, name):
            yield name, child
    if favour and model in FAVOUR:
        name = FAVOUR[model]
        yield name, module.get_submodule(name)


def mask_of(outputs: int, inputs: int, form: Format, zeros: float, random: np.random.Generator) -> np.ndarray:
    """Which elements of a matrix stay, as bool (outputs, inputs): a share of 1 - `zeros` of the blocks, at random.

    With N of M, the N that stay are drawn in each group, and `zeros` must be what the format says.
    """
    rows, columns = -(-outputs // form.rows), -(-inputs // form.cols)
    if form.m > 1:
        assert abs(1 - form.n / form.m - zeros) < 1e-9, f"{form} does not have {zeros:.0%} zeros"
        rank = random.random((rows, -(-columns // form.m), form.m)).argsort(-1).argsort(-1)
        kept = (rank < form.n).reshape(rows, -1)[:, :columns]
    else:
        kept = np.ones(rows * columns, bool)
        kept[random.permutation(kept.size)[: round(kept.size * zeros)]] = False
        kept = kept.reshape(rows, columns)
    return kept.repeat(form.rows, 0).repeat(form.cols, 1)[:outputs, :inputs]


def sparsify(model: str, module: nn.Module, text: str, zeros: float, favour: bool = False) -> dict[str, np.ndarray]:
    """Put zeros into the weights of `module`, in place; what stays grows, so that signals keep their size.

    Args:
        model: its name, which says the weights that are meant.
        module: as `load` gives it.
        text: a sparse format, such as "4x1".
        zeros: the share of zeros.
        favour: put them into the weights of FAVOUR, too.

    Returns:
        Each such weight as it is now, by module name.
    """
    form = parse_format(text)
    random = np.random.default_rng([round(1000 * zeros), *text.encode()])
    changed = {}
    for name, child in chosen(model, module, favour):
        weight = child.weight.detach()
        outputs, inputs, *taps = weight.shape
        mask = mask_of(outputs, weight[0].numel(), form, zeros, random)
        # Of a convolution the columns are taps with their channels, channels fastest, as in graphopt.sparsity.
        kept = torch.from_numpy(np.moveaxis(mask.reshape(outputs, *taps, inputs), -1, 1).copy())
        child.weight.data = weight * kept / (1 - zeros) ** 0.5
        changed[name] = child.weight.detach().numpy()
    return changed
