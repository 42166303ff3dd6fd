"""LLaVA from transformers, tiny and with random weights: prefill, and what decoding goes on from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.architectures import enliven
from tests.hf_models import seeded

WORDS, LENGTH, START, PLACES, LAYERS = 100, 18, 4, 9, 4


class Prefill(nn.Module):
    """Logits, and each layer's keys and values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**inputs, use_cache=True)
        return (found.logits, *(each for layer in found.past_key_values.layers for each in (layer.keys, layer.values)))


def entering(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What the first layer of the decoder reads: words and image, (b, n, c)."""
    seen: list[Tensor] = []
    layer = model.model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**inputs)
    hook.remove()
    return seen[0]


VISION = {
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}


def hf_llava(attention: str = "sdpa", vision: dict[str, int] = VISION, text: dict[str, int] = TEXT) -> Prefill:
    """Attention is "sdpa" or "eager"; the others are its configurations."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_id=WORDS - 1,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
    )
    config._attn_implementation = attention

    def made() -> nn.Module:
        model = LlavaForConditionalGeneration(config)
        enliven(model)
        return model

    return Prefill(seeded(made)).eval()


def hf_example(batch: int = 1, padded: int = 0, vision: dict[str, int] = VISION) -> dict[str, Tensor]:
    """Words around an image's places; `padded` tokens in front are hidden by an attention mask, where there are any."""
    random = torch.Generator().manual_seed(2)
    side = vision["image_size"]
    places = (side // vision["patch_size"]) ** 2
    ids = torch.randint(1, WORDS - 1, (batch, LENGTH - PLACES + places), generator=random)
    ids[:, START : START + places] = WORDS - 1
    found = {"input_ids": ids, "pixel_values": torch.randn(batch, 3, side, side, generator=random)}
    if padded:
        found["attention_mask"] = (torch.arange(LENGTH) >= padded).long().expand(batch, -1).contiguous()
    return found
