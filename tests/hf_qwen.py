"""Qwen2-VL from transformers, tiny and with random weights: images of one grid, positions in three rows (M-RoPE)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.vision_utils import get_vision_position_ids

from tests.architectures import enliven
from tests.hf_models import seeded

GRID, SIDE = (1, 4, 6), 2  # frames, rows and columns of patches; SIDE * SIDE of them become a token
PATCHES, PLACES, START, LENGTH, LAYERS = 24, 6, 4, 15, 4
IMAGE = 99


class Prefill(nn.Module):
    """Logits, and each layer's keys and values. How patches are laid out is fixed with the grid of the images."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("grid", torch.tensor([GRID] * batch))
        self.register_buffer("patches", get_vision_position_ids(self.grid, SIDE))
        self.ends = np.arange(batch + 1) * PATCHES  # of each image's patches; what is read of a tensor is no constant

    def forward(self, pixel_values: Tensor, **inputs: Tensor) -> tuple[Tensor, ...]:
        tower = self.model.model.visual
        seen = tower(pixel_values, grid_thw=self.grid, position_ids=self.patches, cu_seqlens=self.ends).pooler_output
        image = {"image": BaseModelOutputWithPooling(pooler_output=(seen,))}
        found = self.model(**inputs, mm_encoder_outputs=image, use_cache=True)
        return (found.logits, *(each for layer in found.past_key_values.layers for each in (layer.keys, layer.values)))


def hf_qwen(attention: str = "sdpa", batch: int = 1) -> Prefill:
    """Attention is "sdpa" or "eager"."""
    vision: Any = {"depth": 3, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    text: Any = {
        "vocab_size": 100,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }
    config = Qwen2VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, bos_token_id=None, eos_token_id=None
    )
    config._attn_implementation = attention

    def made() -> nn.Module:
        model = Qwen2VLForConditionalGeneration(config)
        enliven(model)
        return model

    return Prefill(seeded(made), batch).eval()


def qwen_example(model: Prefill, batch: int = 1) -> dict[str, Tensor]:
    """Words around an image's places, and positions as the model makes them; those of each sample start one later."""
    random = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 90, (batch, LENGTH), generator=random)
    ids[:, START : START + PLACES] = IMAGE
    places, _ = model.model.model.get_rope_index(ids, (ids == IMAGE).int(), model.grid)
    pixels = torch.randn(batch * PATCHES, 3 * 2 * 4 * 4, generator=random)
    return {"pixel_values": pixels, "input_ids": ids, "position_ids": places + torch.arange(batch)[:, None]}
