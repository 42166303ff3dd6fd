"""Token reduction written directly in PyTorch, from the papers' formulas: what passes are held to."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.transformer_nets import VisionTransformer

# (x, attention map (b, h, n, n), keys (b, h, n, d), size (b, n), block) to (x, size); the class token is first.
Step = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def reduced(model: VisionTransformer, x: Tensor, step: Step, proportional: bool = True) -> Tensor:
    """The class logits of a vision transformer that reduces its tokens by `step` between attention and MLP."""
    x = model.patch(x).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls.expand(x.shape[0], -1, -1), x], 1) + model.position
    size = x.new_ones(x.shape[:2])
    for number, block in enumerate(model.blocks):
        b, n, c = x.shape
        layer = block.attention
        q, k, v = layer.project[0](block.norm1(x)).view(b, n, 3, layer.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = (logits + size.log()[:, None, None, :] if proportional else logits).softmax(-1)
        x = x + layer.out((weights @ v).transpose(1, 2).reshape(b, n, c))
        x, size = step(x, weights, k, size, number)
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[:, 0])


def class_scores(attention: Tensor) -> Tensor:
    """What the class token pays to each other one, mean over heads."""
    return attention.mean(1)[:, 0, 1:]


def each(x: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Samples one by one."""
    return [tuple(items) for items in zip(x, *others, strict=True)]


def prune_merge(through: list[int], kept: list[int]) -> Step:
    """DiffRate: drop behind the first `through`, merge those behind the first `kept`; sorted by class attention."""

    def step(x: Tensor, attention: Tensor, keys: Tensor, size: Tensor, block: int) -> tuple[Tensor, Tensor]:
        rows, sizes = [], []
        for own, score, s in each(x, class_scores(attention), size):
            order = [0, *(score.argsort(descending=True) + 1).tolist()]
            sorted_, s = own[order][: through[block] + 1], s[order][: through[block] + 1].clone()
            stay = kept[block] + 1
            sums, count = sorted_[:stay].clone(), torch.ones(stay)
            for j in range(stay, len(sorted_)):
                likeness = F.cosine_similarity(sorted_[j][None], sorted_[1:stay], dim=-1)
                to = int(likeness.argmax()) + 1
                sums[to] += sorted_[j]
                count[to] += 1
                s[to] += s[j] * likeness[to - 1]
            rows.append(sums / count[:, None])
            sizes.append(s[:stay])
        return torch.stack(rows), torch.stack(sizes)

    return step


def transform(kept: list[int], tau: float, spread: float) -> Step:
    """Token Transforming: every token is shared out among centres by a softmax of cosines of keys."""

    def step(x: Tensor, attention: Tensor, keys: Tensor, size: Tensor, block: int) -> tuple[Tensor, Tensor]:
        rows, sizes = [], []
        for own, score, k, s in each(x, class_scores(attention), keys.mean(1), size):
            unit = F.normalize(k[1:], dim=-1)
            cosine = unit @ unit.T
            first = [
                i
                for i in range(len(unit))
                if not any(cosine[i, j] > spread and score[j] > score[i] for j in range(len(unit)))
            ]
            rest = [i for i in range(len(unit)) if i not in first]
            ranked = [sorted(group, key=lambda i: -float(score[i])) for group in (first, rest)]
            centres = sorted((ranked[0] + ranked[1])[: kept[block]])
            shares = (cosine[:, centres] / tau).softmax(-1)
            for place, centre in enumerate(centres):
                shares[centre] = F.one_hot(torch.tensor(place), len(centres)).float()
            new = (shares * s[1:, None]).T
            rows.append(torch.cat([own[:1], new @ own[1:] / new.sum(-1, keepdim=True)]))
            sizes.append(torch.cat([s[:1], new.sum(-1)]))
        return torch.stack(rows), torch.stack(sizes)

    return step


def contextual(kept: int, context: int, rule: str) -> Step:
    """VisionDrop: dominant tokens in order, and the others gathered at evenly spaced ones of them; in block 0."""

    def step(x: Tensor, attention: Tensor, keys: Tensor, size: Tensor, block: int) -> tuple[Tensor, Tensor]:
        if block:
            return x, size
        rows = []
        for own, score, k in each(x, class_scores(attention), keys.mean(1)):
            order = (score.argsort(descending=True) + 1).tolist()
            dominant, others = sorted(order[: kept - context]), sorted(order[kept - context :])
            targets = others[:: max(1, len(others) // context)][:context]
            given: dict[int, list[Tensor]] = {target: [] for target in targets}
            for other in (i for i in others if i not in targets):
                best = max(targets, key=lambda t: float(F.cosine_similarity(k[other], k[t], dim=0)))
                given[best].append(own[other])
            gathered = []
            for target in targets:
                if rule == "mean":
                    gathered.append(torch.stack([own[target], *given[target]]).mean(0))
                else:
                    more = torch.stack(given[target]).mean(0) if given[target] else 0.0
                    gathered.append(own[target] + more)
            rows.append(torch.stack([own[0], *own[dominant], *gathered]))
        out = torch.stack(rows)
        return out, out.new_ones(out.shape[:2])

    return step


def top_k(kept: list[int]) -> Step:
    """EViT without its fused token: the most attended stay, in order."""

    def step(x: Tensor, attention: Tensor, keys: Tensor, size: Tensor, block: int) -> tuple[Tensor, Tensor]:
        index = class_scores(attention).topk(kept[block], -1).indices.sort(-1).values + 1
        index = torch.cat([torch.zeros_like(index[:, :1]), index], 1)
        return torch.stack([own[i] for own, i in zip(x, index, strict=True)]), size[:, : index.shape[1]]

    return step
