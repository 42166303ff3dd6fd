"""The base models of `transformers`, one of each architecture: tiny, random weights from fixed seeds.

`ARCHITECTURES[name]()` returns (module in eval mode, example inputs by argument name), as those of `models.py` do. The
names are those that transformers gives its configurations; it is imported when the first model is built, not before.
The sizes are small and, where the architecture lets them, differ from one another, so that no two dimensions are equal
by accident.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Tensor]]
Inputs = Callable[[], dict[str, Tensor]]

_LENGTH, _WORDS = 16, 100


# Inputs --------------------------------------------------------------------------------------------------------------


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _text() -> dict[str, Tensor]:
    from tests.hf_models import ids

    return {"input_ids": ids(_LENGTH, _WORDS)}


def _masked_text() -> dict[str, Tensor]:
    """With a mask to be added to scores, for a model that does not get along with its own."""
    return _text() | {"attention_mask": torch.where(torch.arange(_LENGTH) < 12, 0.0, -1e4)[None, None, None]}


def _image(size: int = 40) -> Inputs:
    def made() -> dict[str, Tensor]:
        from tests.hf_models import pixels

        return pixels(size)

    return made


def _translation() -> dict[str, Tensor]:
    from tests.hf_models import ids

    return _text() | {"decoder_input_ids": ids(10, _WORDS)}


def _speech(frames: int, features: int, *, channels_first: bool) -> Inputs:
    """Spectra, and the words so far."""

    def made() -> dict[str, Tensor]:
        from tests.hf_models import ids

        shape = (1, features, frames) if channels_first else (1, frames, features)
        return {"input_features": _random(*shape), "decoder_input_ids": ids(10, _WORDS)}

    return made


def _waves() -> dict[str, Tensor]:
    return {"input_values": _random(1, 2000)}


def _captioned(size: int, places: int = 0) -> Inputs:
    """Text and an image; the first `places` words stand for the image."""

    def made() -> dict[str, Tensor]:
        words = _text()["input_ids"]
        words = torch.where(words == _WORDS - 1, 3, words)
        words[:, :places] = _WORDS - 1
        return {"input_ids": words} | _image(size)()

    return made


def _embedded_image() -> dict[str, Tensor]:
    """Text and the embeddings of an image's patches, for a model that would scale the image by what its mask says."""
    return _text() | {"image_embeds": _random(1, 25, 32), "pixel_mask": (torch.arange(25) < 20)[None].long()}


def _masked_image() -> dict[str, Tensor]:
    """What is drawn by lot to be hidden is an input, so that two runs agree."""
    return _image()() | {"noise": _random(1, 25)}


# Configurations ------------------------------------------------------------------------------------------------------

_ENCODER = {
    "vocab_size": _WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
_DECODER = _ENCODER | {"num_key_value_heads": 2, "use_cache": False}
_GPT = {"vocab_size": _WORDS, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "use_cache": False}
_EXPERTS = {"num_experts_per_tok": 2}
_PATCHES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "image_size": 40,
    "patch_size": 8,
}
_SEQ2SEQ = {
    "vocab_size": _WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "use_cache": False,
}
_SPEECH = _SEQ2SEQ | {"max_target_positions": 24}
_WAVES = _ENCODER | {
    "conv_dim": [12, 12, 20],
    "conv_stride": [5, 4, 2],
    "conv_kernel": [10, 4, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}
_DETR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 48,
    "num_queries": 7,
}
_RESNET = {"embedding_size": 8, "hidden_sizes": [16, 24, 40], "depths": [1, 2, 1], "layer_type": "basic"}
_CLIP_TEXT = _ENCODER | {"max_position_embeddings": _LENGTH, "projection_dim": 20, "eos_token_id": 2}

# Name: its inputs and its configuration. Where a value is a pair, it is a configuration itself: (name, its values).
_TABLE: dict[str, tuple[Inputs, dict[str, Any]]] = {
    # Encoders of text
    "roberta": (_text, _ENCODER),
    "albert": (_text, _ENCODER | {"embedding_size": 20}),
    "distilbert": (
        _text,
        {"vocab_size": _WORDS, "dim": 32, "hidden_dim": 56, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 24},
    ),
    "electra": (_text, _ENCODER | {"embedding_size": 20}),
    "mobilebert": (
        _text,
        _ENCODER | {"embedding_size": 20, "intra_bottleneck_size": 24, "num_feedforward_networks": 2},
    ),
    "deberta-v2": (_text, _ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "mpnet": (_text, _ENCODER | {"pad_token_id": 1}),
    "convbert": (_text, _ENCODER | {"embedding_size": 20, "conv_kernel_size": 5}),
    "squeezebert": (_text, _ENCODER | {"embedding_size": 32}),
    "camembert": (_text, _ENCODER),
    "layoutlm": (_text, _ENCODER | {"max_2d_position_embeddings": 40}),
    "fnet": (_text, {key: value for key, value in _ENCODER.items() if key != "num_attention_heads"}),
    "nystromformer": (
        _masked_text,
        _ENCODER | {"num_landmarks": 4, "segment_means_seq_len": _LENGTH, "conv_kernel_size": 5},
    ),
    # Decoders of text
    "gpt_neo": (
        _text,
        {
            "vocab_size": _WORDS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 56,
            "max_position_embeddings": 24,
            "window_size": 6,
            "attention_types": [[["global", "local"], 1]],
            "use_cache": False,
        },
    ),
    "gpt_neox": (_text, _ENCODER | {"use_cache": False}),
    "gptj": (_text, _GPT | {"rotary_dim": 4}),
    "opt": (
        _text,
        {
            "vocab_size": _WORDS,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 56,
            "max_position_embeddings": 24,
            "word_embed_proj_dim": 20,
            "use_cache": False,
        },
    ),
    "bloom": (_text, {"vocab_size": _WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False}),
    "mistral": (_text, _DECODER | {"head_dim": 8, "sliding_window": 6}),
    "qwen2": (_text, _DECODER),
    "qwen3": (_text, _DECODER | {"head_dim": 12}),
    "gemma": (_text, _DECODER | {"head_dim": 12}),
    "gemma2": (_text, _DECODER | {"head_dim": 12, "sliding_window": 6}),
    "phi": (_text, _DECODER),
    "phi3": (_text, _DECODER),
    "falcon": (
        _text,
        {"vocab_size": _WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "use_cache": False},
    ),
    "olmo": (_text, _DECODER),
    "olmo2": (_text, _DECODER),
    "cohere": (_text, _DECODER),
    "starcoder2": (_text, _DECODER),
    "stablelm": (_text, _DECODER),
    "granite": (_text, _DECODER),
    "mixtral": (_text, _DECODER | _EXPERTS | {"num_local_experts": 5, "intermediate_size": 24}),
    "qwen2_moe": (
        _text,
        _DECODER | _EXPERTS | {"num_experts": 5, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    ),
    "olmoe": (_text, _DECODER | _EXPERTS | {"num_experts": 5, "intermediate_size": 24}),
    "mamba": (
        _text,
        {"vocab_size": _WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 6, "use_cache": False},
    ),
    "mamba2": (
        _text,
        {
            "vocab_size": _WORDS,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 6,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "use_cache": False,
        },
    ),
    "rwkv": (
        _text,
        {
            "vocab_size": _WORDS,
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "context_length": 24,
            "use_cache": False,
        },
    ),
    "codegen": (_text, _GPT | {"rotary_dim": 4, "n_ctx": 24}),
    "xglm": (
        _text,
        {
            "vocab_size": _WORDS,
            "d_model": 32,
            "ffn_dim": 56,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 24,
            "use_cache": False,
        },
    ),
    # Images
    "beit": (_image(), _PATCHES | {"use_relative_position_bias": True}),
    "dinov2": (_image(), {**_PATCHES, "mlp_ratio": 2}),
    "swinv2": (
        _image(32),
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "convnextv2": (_image(), {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2}),
    "mobilevit": (
        _image(64),
        {
            "image_size": 64,
            "hidden_sizes": [24, 32, 40],
            "neck_hidden_sizes": [8, 12, 16, 20, 28, 36, 48],
            "expand_ratio": 2.0,
        },
    ),
    "mobilenet_v1": (_image(), {"image_size": 40, "depth_multiplier": 0.25}),
    "mobilenet_v2": (_image(), {"image_size": 40, "depth_multiplier": 0.25}),
    "resnet": (_image(), _RESNET | {"layer_type": "bottleneck"}),
    "regnet": (
        _image(),
        {"embedding_size": 8, "hidden_sizes": [16, 24, 40, 48], "depths": [1, 2, 1, 1], "groups_width": 8},
    ),
    "segformer": (
        _image(64),
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "num_attention_heads": [1, 2, 3, 4]},
    ),
    "pvt": (
        _image(64),
        {
            "image_size": 64,
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1] * 4,
            "num_attention_heads": [1, 2, 3, 4],
            "mlp_ratios": [2] * 4,
        },
    ),
    "poolformer": (_image(64), {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "mlp_ratio": 2.0}),
    "levit": (
        _image(64),
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 2, 1],
            "key_dim": [8, 8, 8],
        },
    ),
    "cvt": (
        _image(64),
        {"embed_dim": [16, 24, 32], "num_heads": [1, 3, 4], "depth": [1, 2, 3], "mlp_ratio": [2.0] * 3},
    ),
    "vit_mae": (
        _masked_image,
        _PATCHES
        | {
            "decoder_hidden_size": 24,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 3,
            "decoder_intermediate_size": 40,
        },
    ),
    "yolos": (_image(), _PATCHES | {"image_size": [40, 40], "num_detection_tokens": 7}),
    "ijepa": (_image(), _PATCHES),
    "siglip_vision_model": (_image(), _PATCHES),
    "clip_vision_model": (_image(), _PATCHES),
    "clip_text_model": (_text, _CLIP_TEXT),
    "efficientnet": (
        _image(64),
        {
            "image_size": 64,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.5,
            "hidden_dim": 320,
        },
    ),
    "bit": (_image(64), {"embedding_size": 8, "hidden_sizes": [16, 24, 40], "depths": [1, 2, 1], "num_groups": 4}),
    "focalnet": (
        _image(64),
        {"image_size": 64, "embed_dim": 16, "hidden_sizes": [24, 32, 40], "depths": [1, 2, 1]}
        | {"focal_levels": [2, 2, 2], "focal_windows": [3, 3, 3]},
    ),
    "hiera": (
        _image(64),
        {
            "image_size": [64, 64],
            "embed_dim": 8,
            "depths": [1, 2, 1],
            "num_heads": [1, 2, 4],
            "num_query_pool": 2,
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, True, False],
        },
    ),
    # Sound
    "wav2vec2": (_waves, _WAVES),
    "hubert": (_waves, _WAVES),
    "whisper": (
        _speech(40, 12, channels_first=True),
        _SPEECH | {"num_mel_bins": 12, "max_source_positions": 20},
    ),
    "speech_to_text": (
        _speech(40, 12, channels_first=False),
        _SPEECH | {"input_feat_per_channel": 12, "max_source_positions": 40, "conv_channels": 24},
    ),
    # Translation
    "t5": (
        _translation,
        {
            "vocab_size": _WORDS,
            "d_model": 32,
            "d_kv": 12,
            "d_ff": 56,
            "num_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 14,
            "relative_attention_max_distance": 20,
            "use_cache": False,
        },
    ),
    "bart": (_translation, _SEQ2SEQ),
    "pegasus": (_translation, _SEQ2SEQ),
    "marian": (_translation, _SEQ2SEQ | {"decoder_vocab_size": _WORDS}),
    "mbart": (_translation, _SEQ2SEQ),
    # Text and images
    "clip": (
        _captioned(40),
        {
            "text_config": _CLIP_TEXT,
            "vision_config": _PATCHES | {"hidden_size": 24, "intermediate_size": 44},
            "projection_dim": 20,
        },
    ),
    "siglip": (
        _captioned(40),
        {"text_config": _CLIP_TEXT | {"projection_size": 32}, "vision_config": _PATCHES | {"intermediate_size": 44}},
    ),
    "llava": (
        _captioned(24, places=9),
        {
            "text_config": ("llama", _DECODER),
            "vision_config": (
                "clip_vision_model",
                _PATCHES | {"hidden_size": 24, "intermediate_size": 44, "image_size": 24},
            ),
            "image_token_id": _WORDS - 1,
            "image_seq_length": 9,
        },
    ),
    "vilt": (_embedded_image, _ENCODER | _PATCHES),
    # Detection
    "detr": (_image(64), _DETR | {"backbone_config": ("resnet", _RESNET | {"out_features": ["stage3"]})}),
    "table-transformer": (_image(64), _DETR | {"backbone_config": ("resnet", _RESNET | {"out_features": ["stage3"]})}),
    "deformable_detr": (
        _image(64),
        _DETR
        | {
            "backbone_config": ("resnet", _RESNET | {"out_features": ["stage1", "stage2", "stage3"]}),
            "num_feature_levels": 3,
            "encoder_n_points": 2,
            "decoder_n_points": 3,
        },
    ),
}

_OF_HF_MODELS = ("bert", "gpt2", "llama", "vit", "deit", "swin", "convnext")


# Building ------------------------------------------------------------------------------------------------------------


def _build(name: str) -> Built:
    from transformers import AutoModel

    from tests.hf_models import seeded

    inputs, values = _TABLE[name]
    config = _config(name, values)

    def make() -> nn.Module:
        module = AutoModel.from_config(config)
        enliven(module)
        return module

    return seeded(make), inputs()


def _of_hf_models(name: str) -> Built:
    from tests.hf_models import HF

    return HF[name]()


def _config(name: str, values: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[name](**{k: _config(*v) if isinstance(v, tuple) else v for k, v in values.items()})


@torch.no_grad()
def enliven(module: nn.Module) -> None:
    """Weights under which every layer counts: as transformers starts them, residual branches are next to nothing, norms
    and biases do nothing, and a wrong one would not show."""
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.normal_(child.weight, std=math.sqrt(1 / child.weight[0].numel()))
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=0.5)
        elif isinstance(child, nn.BatchNorm2d):
            child.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            child.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))


ARCHITECTURES: dict[str, Callable[[], Built]] = {
    **{name: partial(_of_hf_models, name) for name in _OF_HF_MODELS},
    **{name: partial(_build, name) for name in _TABLE},
}
