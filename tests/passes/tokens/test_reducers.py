"""What every reducer keeps: each token once, sizes, the sum of tokens, duplicates; alone, on random views."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.cut import Kept, fold, unfold
from graphopt.passes.tokens.reducers import REDUCERS, Reducer, make
from graphopt.passes.tokens.view import View
from graphopt.region import Span

SPAN, CHANNELS, HEADS = 16, 8, 2

# Each with the counts that it takes of 16 tokens, which are a grid of 4 x 4.
CASES: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("top-k", {}, (1, 5, 15)),
    ("listed", {"gone": (1, 2, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14)}, (4,)),
    ("bipartite", {}, (8, 11, 15)),
    ("bipartite", {"features": True}, (8, 11, 15)),
    ("prune-merge", {}, (1, 6, 15)),
    ("prune-merge", {"share": 0.0}, (1, 6, 15)),
    ("transform", {}, (1, 6, 15)),
    ("transform", {"hard_self": False, "tau": 1.0}, (1, 6, 15)),
    ("contextual", {"context": 3}, (3, 9, 13)),
    ("contextual", {"context": 3, "rule": "add"}, (3, 9, 13)),
    ("cluster", {}, (1, 6, 15)),
    ("pool", {}, (4,)),
]
CONSERVING = ("bipartite", "transform", "cluster", "pool")
each_case = pytest.mark.parametrize(("name", "options", "counts"), CASES)


def view_of(seed: int, batch: int, start: int, behind: int, sized: bool, pairs: bool = False) -> tuple[View, Tensor]:
    """A random place, and random scores; `pairs`: tokens 2 i and 2 i + 1 are the same."""
    generator = torch.Generator().manual_seed(seed)
    n = start + SPAN + behind
    x = torch.randn(batch, n, CHANNELS, generator=generator)
    key = torch.randn(batch, HEADS, n, CHANNELS, generator=generator)
    scores = torch.randn(batch, SPAN, generator=generator)
    if pairs:
        x[:, start + 1 : start + SPAN : 2] = x[:, start : start + SPAN : 2]
        key[:, :, start + 1 : start + SPAN : 2] = key[:, :, start : start + SPAN : 2]
    size = torch.randint(1, 5, (batch, SPAN), generator=generator).float() if sized else None
    return View(x, query=key, key=key, value=key, size=size, start=start, stop=start + SPAN), scores


def reduce(reducer: Reducer, view: View, scores: Tensor, count: int) -> tuple[Kept, Tensor]:
    """What a reducer chooses, and the tokens that it makes."""
    kept = reducer(view, scores if reducer.scored else None, count)
    return kept, fold(view.x, kept, Span(1, view.start, view.stop))


def test_every_reducer_is_tested_here() -> None:
    """The table above has all that are registered."""
    assert {name for name, _, _ in CASES} == set(REDUCERS)


@each_case
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch=st.sampled_from([1, 3]),
    start=st.integers(0, 3),
    behind=st.integers(0, 2),
    sized=st.booleans(),
    data=st.data(),
)
def test_tokens_are_kept_merged_or_dropped(
    name: str,
    options: dict[str, Any],
    counts: tuple[int, ...],
    seed: int,
    batch: int,
    start: int,
    behind: int,
    sized: bool,
    data: st.DataObject,
) -> None:
    """As many come out as were asked for, protected ones as they were; each of the span is kept or merged at most
    once; where reducers drop none, sizes and the weighted sum of tokens stay what they were."""
    count = data.draw(st.sampled_from(counts))
    reducer = make(name, **options)
    view, scores = view_of(seed, batch, start, behind, sized)
    kept, out = reduce(reducer, view, scores, count)
    assert kept.index.shape == (batch, count)
    assert out.shape == (batch, start + count + behind, CHANNELS)
    assert torch.equal(out[:, :start], view.x[:, :start])
    assert torch.equal(out[:, start + count :], view.x[:, view.stop :])
    for sample in range(batch):
        used = kept.index[sample].tolist() + (kept.sources[sample].tolist() if kept.sources is not None else [])
        assert len(set(used)) == len(used)
        assert set(used) <= set(range(SPAN))
        if kept.sources is not None and not reducer.drops:
            assert len(used) == SPAN
    if reducer.ordered:
        assert (kept.index.diff(dim=1) > 0).all()
    if name in CONSERVING:
        torch.testing.assert_close(kept.size.sum(1), view.sizes.sum(1))
        sums = (out[:, start : start + count] * kept.size[..., None]).sum(1)
        torch.testing.assert_close(sums, (view.tokens * view.sizes[..., None]).sum(1), atol=1e-4, rtol=1e-4)
    if kept.matrix is not None and options.get("rule") != "add":  # new tokens are means
        torch.testing.assert_close(kept.matrix.sum(-1), torch.ones(batch, count))
    if kept.spread is not None:  # and each token comes back as a mean
        torch.testing.assert_close(kept.spread.sum(-1), torch.ones(batch, SPAN))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bipartite", {}),
        ("bipartite", {"features": True}),
        ("prune-merge", {"share": 0.0}),
        ("cluster", {}),
        ("transform", {"tau": 1e-3, "spread": 1.0}),
        ("transform", {"tau": 1e-3, "spread": 0.999}),
    ],
)
@pytest.mark.parametrize("start", [0, 1, 4])
def test_merged_duplicates_come_back_as_they_were(name: str, options: dict[str, Any], start: int) -> None:
    """Eight pairs into eight tokens: each stands for two, and unmerge(merge(x)) is x."""
    view, scores = view_of(1, 2, start, 1, sized=False, pairs=True)
    scores[:, ::2] = scores[:, ::2].abs() + 1  # the first of each pair matters more than any second one
    scores[:, 1::2] = -scores[:, 1::2].abs()
    kept, out = reduce(make(name, **options), view, scores, 8)
    torch.testing.assert_close(kept.size, torch.full((2, 8), 2.0), atol=1e-4, rtol=0)
    again = unfold(out, kept, Span(1, view.start, view.stop))
    torch.testing.assert_close(again, view.x, atol=1e-4, rtol=1e-4)


def test_sizes_of_unlike_tokens_grow_less() -> None:
    """DiffRate: a token that is merged counts as much as it is like what it goes to."""
    view, scores = view_of(2, 1, 1, 0, sized=True)
    kept, _ = reduce(make("prune-merge", share=0.0), view, scores, 15)
    features = torch.nn.functional.normalize(view.tokens[0], dim=-1)
    likeness = float((features[kept.sources[0, 0]] * features[kept.index[0]]).sum(-1).max())
    grown = view.sizes.sum() - view.sizes[0, kept.sources[0, 0]] * (1 - likeness)
    torch.testing.assert_close(kept.size.sum(), grown)


def test_transforming_to_as_many_tokens_is_the_identity() -> None:
    """Every token is a centre, and a centre goes to itself alone."""
    view, scores = view_of(3, 2, 1, 0, sized=True)
    kept, out = reduce(make("transform"), view, scores, SPAN)
    torch.testing.assert_close(out, view.x)
    torch.testing.assert_close(kept.size, view.sizes)


def test_transforming_sharply_is_merging() -> None:
    """Towards temperature 0 every token goes to the centre that is most like it, as a weighted mean."""
    view, scores = view_of(4, 2, 1, 0, sized=True)
    kept, out = reduce(make("transform", tau=1e-7, spread=1.0), view, scores, 5)
    metric = torch.nn.functional.normalize(view.metric, dim=-1)
    for sample in range(2):
        to = (metric[sample] @ metric[sample, kept.index[sample]].T).argmax(-1)
        for slot in range(5):
            weight = view.sizes[sample] * (to == slot)
            mean = (view.tokens[sample] * weight[:, None]).sum(0) / weight.sum()
            torch.testing.assert_close(out[sample, 1 + slot], mean, atol=1e-4, rtol=1e-4)


def test_equal_tokens_give_twice_a_token_by_the_published_rule() -> None:
    """VisionDrop: target + mean of the others doubles the norm, the mean does not."""
    view, scores = view_of(5, 1, 1, 0, sized=False)
    view.x[:, 1:] = view.x[:, 1:2]
    for rule, factor in (("add", 2.0), ("mean", 1.0)):
        _, out = reduce(make("contextual", context=2, rule=rule), view, scores, 6)
        torch.testing.assert_close(out[0, 5:], factor * view.x[0, 1:3])


@pytest.mark.parametrize("rule", ["mean", "add"])
def test_a_target_that_nothing_goes_to_is_as_it_was(rule: str) -> None:
    """VisionDrop: of two targets, the others all go to the first; each of them counts once."""
    view, scores = view_of(5, 1, 1, 0, sized=False)
    scores[0] = -torch.arange(SPAN).float()  # the first ten stay; the others are 10 to 15, 10 and 13 targets
    view.key[:, :, 1:] = view.key[:, :, 11:12]
    view.key[:, :, 1 + 13] *= -1
    kept, out = reduce(make("contextual", context=2, rule=rule), view, scores, 12)
    assert kept.index[0].tolist() == [*range(10), 10, 13]
    assert torch.equal(out[0, 1:11], view.x[0, 1:11])
    torch.testing.assert_close(out[0, 12], view.x[0, 1 + 13])
    others = view.x[0, [1 + n for n in (11, 12, 14, 15)]]
    target = view.x[0, 1 + 10]
    gathered = torch.cat([target[None], others]).mean(0) if rule == "mean" else target + others.mean(0)
    torch.testing.assert_close(out[0, 11], gathered)


def test_no_contextual_tokens_are_top_k() -> None:
    """context=0 divides nothing by zero: what is not dominant is dropped."""
    view, scores = view_of(9, 2, 1, 0, sized=False)
    (_, one), (_, two) = (reduce(make(*each), view, scores, 6) for each in (("top-k",), ("contextual",)))
    assert not torch.equal(one, two)
    _, none = reduce(make("contextual", context=0), view, scores, 6)
    assert torch.equal(one, none)


def test_clusters_are_those_of_lloyd() -> None:
    """k-means by cosine, seeds fixed in their clusters, the steps written out."""
    view, scores = view_of(6, 1, 1, 0, sized=True)
    kept, out = reduce(make("cluster", steps=3), view, scores, 4)
    unit = torch.nn.functional.normalize(view.metric[0], dim=-1)
    seeds = sorted(scores[0].topk(4).indices.tolist())
    centres = unit[seeds]
    for _ in range(4):
        to = (unit @ centres.T).argmax(-1)
        to[seeds] = torch.arange(4)
        means = torch.stack([unit[to == slot].sum(0) for slot in range(4)])
        centres = torch.nn.functional.normalize(means, dim=-1)
    weights = torch.stack([view.sizes[0] * (to == slot) for slot in range(4)])
    torch.testing.assert_close(out[0, 1:], weights @ view.tokens[0] / weights.sum(1, keepdim=True))
    torch.testing.assert_close(kept.size[0], weights.sum(1))


def test_pooling_is_average_pooling() -> None:
    """Cells of the grid of tokens, as `avg_pool2d` has them, and copies of a cell's mean where all are wanted."""
    view, scores = view_of(7, 2, 1, 0, sized=False)
    kept, out = reduce(make("pool"), view, scores, 4)
    grid = view.tokens.transpose(1, 2).unflatten(2, (4, 4))
    pooled = torch.nn.functional.avg_pool2d(grid, 2)
    torch.testing.assert_close(out[:, 1:], pooled.flatten(2).transpose(1, 2))
    again = unfold(out, kept, Span(1, 1, 17))
    wanted = pooled.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).transpose(1, 2)
    torch.testing.assert_close(again[:, 1:], wanted)


def test_a_grid_that_is_none_is_refused() -> None:
    """Pooling says what does not fit."""
    view, scores = view_of(8, 1, 1, 0, sized=False)
    with pytest.raises(AssertionError, match="no coarser grid"):
        reduce(make("pool"), view, scores, 5)
    with pytest.raises(AssertionError, match="no grid of 3 x 5"):
        reduce(make("pool", rows=3, columns=5), view, scores, 4)
