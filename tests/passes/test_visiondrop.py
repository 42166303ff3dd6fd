"""Visual tokens rank each other, and contextual tokens gather what is dropped."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt.passes import make
from tests.passes.tokens.visual import logits_of, program_of
from tests.transformer_nets import rotate, tables
from tests.vision_language import BEFORE, VISUAL, example, llava


@pytest.mark.parametrize(("name", "way"), [("pyramid-drop", "keep"), ("visiondrop", "renumber")])
def test_samples_choose_for_themselves(name: str, way: str) -> None:
    """A batch of two gives what each gives alone; with positions kept, tables are looked up for each."""
    model, inputs = llava(), example(2)
    both = logits_of(make(name, positions=way)(program_of(model, inputs)), inputs)
    for sample in range(2):
        own = {key: value[sample : sample + 1] for key, value in inputs.items()}
        alone = logits_of(make(name, positions=way)(program_of(model, own)), own)
        torch.testing.assert_close(both[sample : sample + 1], alone, atol=2e-5, rtol=1e-4)


def test_visiondrop_equals_its_formulas() -> None:
    """Visual-to-visual attention of the next layer ranks, contextual tokens gather what is dropped."""
    model, inputs = llava(), example()
    small = make("visiondrop", sites=(1,), counts=(8,), reducer="contextual:context=3")(program_of(model, inputs))
    decoder = model.decoder
    with torch.no_grad():
        x = model.embed(inputs["input_ids"], inputs["pixels"])
        places = tables(torch.arange(x.shape[1]), decoder.size)
        for block in decoder.blocks[:2]:
            x = block(x, *places)
        following = decoder.blocks[2]
        y = following.norm1(x)
        q, k = (rotate(f(y).view(1, 24, -1, 8).transpose(1, 2), *places)[0] for f in (following.q, following.k))
        k = k.repeat_interleave(2, 0)
        logits = q @ k.transpose(-1, -2) * 8**-0.5 + torch.full((24, 24), -torch.inf).triu(1)
        visual = slice(BEFORE, BEFORE + VISUAL)
        score = logits.softmax(-1).mean(0)[visual, visual].mean(0)
        metric = k.mean(0)[visual]
        order = score.argsort(descending=True).tolist()
        dominant, others = sorted(order[:5]), sorted(order[5:])
        targets = others[:: max(1, len(others) // 3)][:3]
        groups = {target: [target] for target in targets}
        for other in (each for each in others if each not in targets):
            groups[max(targets, key=lambda t: float(F.cosine_similarity(metric[other], metric[t], dim=0)))].append(
                other
            )
        image = x[0, visual]
        gathered = [image[members].mean(0) for members in groups.values()]
        x = torch.cat([x[0, :BEFORE], image[dominant], torch.stack(gathered), x[0, BEFORE + VISUAL :]])[None]
        for block in decoder.blocks[2:]:
            x = block(x, *tables(torch.arange(x.shape[1]), decoder.size))
        wanted = decoder.head(decoder.norm(x))
    torch.testing.assert_close(logits_of(small, inputs), wanted, atol=2e-5, rtol=1e-4)
