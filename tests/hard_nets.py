"""Models that break tools for structured pruning: plain torch, random weights from fixed seeds, tiny sizes.

`HARD[name]()` builds (module in eval mode, example inputs by argument name), as `TINY` of `models.py` does. Sizes
that mean different things differ, so what is confused shows. Norms have weights that are not one and zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.hard_convnets import (
    DenseNet,
    EinsumExcite,
    GroupNormNet,
    InstanceNormNet,
    MobileNetV3,
    Multiplier,
    ResNext,
    ShuffleNet,
    SuperResolution,
    TiedConvs,
    TransposedDecoder,
    TwoBranches,
    UpsampleUNet,
    Video,
    WaveNet,
    WeightNormed,
    Yolo,
)
from tests.hard_decoders import GroupedDecoder, Style
from tests.hard_sequences import Elman, Gru, Lstm, Mamba, Mixture, Raft
from tests.hard_transformers import (
    DistilledVit,
    Dit,
    EncoderDecoder,
    Hiera,
    ModuleAttention,
    MultiscaleVit,
    SpelledEncoder,
)
from tests.models import Built, table
from tests.transformer_nets import RMSNorm

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d, RMSNorm)


def features(*shape: int, name: str = "x", seed: int = 2) -> dict[str, Tensor]:
    """One seeded tensor."""
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


def words(count: int, *shape: int, name: str = "input_ids", seed: int = 2) -> dict[str, Tensor]:
    """Seeded word numbers below `count`."""
    return {name: torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed))}


def _noise() -> dict[str, Tensor]:
    return features(7, 4, 10, 10) | {"t": torch.linspace(3, 250, 7)} | words(6, 7, name="label")


def _sequences() -> dict[str, Tensor]:
    return words(50, 5, 10, name="source") | words(50, 5, 7, name="target", seed=3)


def _with_norms(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The module with norms that do something."""

    def made() -> nn.Module:
        model = make()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, NORMS) and module.weight is not None:
                    module.weight.uniform_(0.6, 1.4)
                    if getattr(module, "bias", None) is not None:
                        module.bias.normal_(0, 0.1)
        return model

    return made


def _spelled(name: str):
    return lambda: SpelledEncoder(name), lambda: features(2, 13, 9)


def _decoder(**style):
    return lambda: GroupedDecoder(Style(**style)), lambda: words(90, 5, 11)


_ENTRIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    # Splits and concatenations
    "shufflenet": (ShuffleNet, lambda: features(1, 3, 32, 32)),
    "yolo": (Yolo, lambda: features(1, 3, 64, 64)),
    "densenet": (DenseNet, lambda: features(1, 3, 24, 24)),
    "unet_upsample": (UpsampleUNet, lambda: features(1, 3, 16, 24)),
    # Groups
    "mobilenet_v3": (MobileNetV3, lambda: features(1, 3, 24, 24)),
    "excite_einsum": (EinsumExcite, lambda: features(2, 3, 16, 16)),
    "resnext": (ResNext, lambda: features(1, 3, 24, 24)),
    "multiplier": (Multiplier, lambda: features(1, 3, 16, 16)),
    # Other convolutions
    "transposed": (TransposedDecoder, lambda: features(2, 13, name="z")),
    "wavenet": (WaveNet, lambda: features(3, 2, 21)),
    "video": (Video, lambda: features(1, 3, 4, 16, 20)),
    "group_norm": (GroupNormNet, lambda: features(1, 3, 16, 16)),
    "instance_norm": (InstanceNormNet, lambda: features(1, 3, 16, 16)),
    "super_resolution": (SuperResolution, lambda: features(1, 3, 12, 16)),
    # Weights and values that are used more than once
    "tied_convs": (TiedConvs, lambda: features(1, 3, 16, 16)),
    "two_branches": (TwoBranches, lambda: features(1, 3, 16, 16)),
    "weight_norm": (WeightNormed, lambda: features(1, 4, 24)),
    # One attention, written in many ways
    "mha_bmm": _spelled("bmm"),
    "mha_einsum": _spelled("einsum"),
    "mha_unbind": _spelled("unbind"),
    "mha_index": _spelled("index"),
    "mha_interleaved": _spelled("interleaved"),
    "mha_chunk": _spelled("chunk"),
    "mha_module": (ModuleAttention, lambda: features(2, 13, 9)),
    # Images
    "deit_distilled": (DistilledVit, lambda: features(4, 3, 40, 40)),
    "mvit": (MultiscaleVit, lambda: features(5, 3, 32, 32)),
    "hiera": (Hiera, lambda: features(5, 3, 24, 24)),
    "dit": (Dit, _noise),
    # Two sequences
    "t5": (EncoderDecoder, _sequences),
    # Decoders
    "gqa_sdpa": _decoder(),
    "gqa_repeat": _decoder(attention="repeat", rotary="interleaved"),
    "gqa_expand": _decoder(attention="expand", tied=True),
    "gqa_einsum": _decoder(attention="einsum", rotary="interleaved", feed="geglu"),
    "gqa_matmul": _decoder(attention="matmul", groups=3),
    "gqa_fused": _decoder(attention="repeat", fused=True, feed="swiglu"),
    "gqa_norm_heads": _decoder(attention="expand", norm_heads=True, groups=3, feed="swiglu"),
    "mqa": _decoder(attention="einsum", groups=1, fused=True, tied=True),
    # Recurrence, scans, experts
    "raft": (Raft, lambda: features(1, 3, 24, 24, name="first") | features(1, 3, 24, 24, name="second", seed=3)),
    "lstm": (Lstm, lambda: features(3, 6, 5)),
    "gru": (Gru, lambda: features(6, 3, 5)),
    "elman": (Elman, lambda: features(3, 6, 5)),
    "moe_dense": (lambda: Mixture(gather=False), lambda: features(4, 6, 9)),
    "moe_gather": (lambda: Mixture(gather=True), lambda: features(4, 6, 9)),
    "mamba": (Mamba, lambda: words(40, 5, 9)),
}

HARD: dict[str, Callable[[], Built]] = table({name: (_with_norms(make), xs) for name, (make, xs) in _ENTRIES.items()})
