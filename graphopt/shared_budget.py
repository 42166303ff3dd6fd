"""One budget for several passes: who uses how much of it.

Passes that shrink axes cut jointly, as one `prune`: one after the other, the first would use all of it. One that sets
weights to zero comes behind them: they leave a share of what the program costs (`--pass prune-channels:share=0.6`, by
default the same factor for both), and zeros take the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.budget import KINDS, Budget
from graphopt.errors import BadRecipe

if TYPE_CHECKING:
    from graphopt.passes.base import Pass
    from graphopt.passes.reduction import Reduction

SHARE = "share"


def together(
    made: Sequence[Pass], steps: Sequence[Mapping[str, Any]], shared: Mapping[str, Any], name: str
) -> list[Pass]:
    """The passes of a recipe with those in one that share its budget.

    Args:
        made: the passes, each with the budget of all.
        steps: their own options, as they were written.
        shared: the options of all.
        name: the recipe's.

    Raises:
        BadRecipe: they cannot share one; says how to write a budget for each.
    """
    from graphopt.passes.cut_and_sparsify import CutAndSparsify
    from graphopt.passes.reduction import Reduction
    from graphopt.passes.sparsify import Sparsify

    pairs = list(zip(made, steps, strict=True))
    sharing = [item for item, own in pairs if _shares(item, own, shared)]
    cuts = [item for item in sharing if isinstance(item, Reduction)]
    zeros = [item for item in sharing if isinstance(item, Sparsify)]
    shares = [(item, own[SHARE]) for item, own in pairs if SHARE in own and isinstance(item, Reduction)]
    mixed = bool(cuts) and len(zeros) == 1
    if shares and not (mixed and all(item in cuts for item, _ in shares)):
        raise BadRecipe(
            what=shares[0][0].name,
            reason=f"its share is that of a budget which one pass that sets weights to zero has in common with it, and "
            f"{name} has none such",
            way_out="give it a budget of its own: flops=0.6",
        )
    if len(sharing) < 2:
        return list(made)
    first = made.index(sharing[0])
    if len(cuts) + len(zeros) < len(sharing) or len(zeros) > 1:
        raise _refusal(sharing, name, "share one budget, and cannot be cut together")
    joint: Pass = _joint(cuts, name)
    if zeros:
        if made.index(zeros[0]) < max(map(made.index, cuts)):
            raise _refusal(sharing, name, "share one budget: name what shrinks in front of what sets weights to zero")
        if ":" in zeros[0].format:
            text = f"{zeros[0].name} keeps {zeros[0].format} whatever the budget, so that it cannot share one"
            way_out = (
                f"--pass {cuts[0].name}:{_budget(cuts[0]).kind}=0.6 --pass {zeros[0].name}, and no budget for both"
            )
            raise BadRecipe(what=name, reason=text, way_out=way_out)
        joint = CutAndSparsify(_joint(cuts, name), zeros[0], _budget(zeros[0]), _share(shares))
    return [*made[:first], joint, *(item for item in made[first:] if item not in sharing)]


def _joint(cuts: Sequence[Reduction], name: str) -> Reduction:
    """Passes that shrink, as one."""
    from graphopt.passes.prune import Prune
    from graphopt.passes.reduction import Reduction
    from graphopt.recipe import options_of

    if len(cuts) == 1:
        return cuts[0]
    own = options_of(Reduction).keys()
    common = [{option: getattr(item, option) for option in own} for item in cuts]
    simple = all(isinstance(item, Prune) or options_of(type(item)).keys() == own for item in cuts)
    if not simple or any(options != common[0] for options in common):
        raise _refusal(cuts, name, "share one budget with other options each, and cannot be cut together")
    roles = tuple(dict.fromkeys(role for item in cuts for role in item.cut_roles))
    return Prune(**common[0], axes=roles)


def _share(shares: Sequence[tuple[Pass, Any]]) -> float | None:
    """What the cut leaves. Raises BadRecipe where that is no share, or two."""
    found = {str(text) for _, text in shares}
    if not found:
        return None
    item = shares[0][0].name
    if len(found) > 1:
        raise BadRecipe(what=item, reason=f"passes that cut jointly leave one share, not {', '.join(sorted(found))}",
                        way_out="give it once")  # fmt: skip
    (text,) = found
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise BadRecipe(what=item, reason=f"share={text} is no share", way_out="give a number above 0, up to 1")
    return share


def _shares(item: Pass, own: Mapping[str, Any], shared: Mapping[str, Any]) -> bool:
    from graphopt.recipe import options_of

    common = any(kind in shared for kind in KINDS) and "budget" in options_of(type(item))
    return common and "keep" not in own and not any(kind in own for kind in KINDS)


def _budget(item: Any) -> Budget:
    budget = item.budget
    assert isinstance(budget, Budget), "it has a part in a budget"
    return budget


def _refusal(sharing: Sequence[Pass], name: str, why: str) -> BadRecipe:
    """That these passes cannot share a budget, with one for each, written out."""
    budget = _budget(sharing[0])
    if budget.absolute:
        texts = [f"--pass {item.name}:{budget.kind}={amount}" for item, amount in zip(sharing, _AMOUNTS, strict=False)]
        way_out = f"give each pass a budget of its own, such as {' '.join(texts)}"
    else:
        each = f"{budget.amount ** (1 / len(sharing)):.3g}"
        texts = [
            f"--pass {item.name}:{budget.kind}={each}{own}" for item, own in zip(sharing, _sites(sharing), strict=True)
        ]
        way_out = f"give each pass a budget of its own, a share of what it finds: {' '.join(texts)}"
    return BadRecipe(what=name, reason=f"{', '.join(item.name for item in sharing)} {why}", way_out=way_out)


def _sites(sharing: Sequence[Pass]) -> list[str]:
    """Options by which passes that reduce tokens take turns: each but the last has the first blocks that are left."""
    from graphopt.passes.tokens.base import TokenReduction

    own = [item for item in sharing if isinstance(item, TokenReduction)]
    return [f",sites={own.index(item)}" if item in own[:-1] else "" for item in sharing]


_AMOUNTS = ("1.2G", "0.6G", "0.3G")
