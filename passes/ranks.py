"""One choice for each of several layers so that together they cost no more than allowed and lose the least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.budget import Budget
from graphopt.passes.sizes import unreachable

_ROUNDS = 100


@dataclass(frozen=True)
class Choice:
    """The options of one layer: what each is, what it loses, what it costs."""

    options: Sequence[int | None]
    lost: Sequence[float]
    cost: Sequence[float]

    def at(self, price: float) -> int:
        """The place of the option that is best when cost has a price; the cheaper one of equals."""
        return min(range(len(self.options)), key=lambda n: (self.lost[n] + price * self.cost[n], self.cost[n]))


def choose(choices: Sequence[Choice], allowed: float, budget: Budget, name: str, rest: float) -> list[int | None]:
    """Pick one option of each choice: total cost at most `allowed`, total loss as little as found.

    First the price of cost at which all layers together fit (options on the convex hull, which are optimal), then what
    is still left over is spent on the steps that gain the most for it.

    Args:
        choices: one per layer.
        allowed: the most they may cost together.
        budget, name, rest: what was asked, of which program, and what else costs, for the error.

    Raises:
        BudgetUnreachable: the cheapest options cost more.
    """
    least = sum(min(choice.cost) for choice in choices)
    if least > allowed:
        raise unreachable(name, budget, rest + least, rest + sum(choice.cost[-1] for choice in choices))
    low, high = 0.0, 1.0
    while _cost(choices, [choice.at(high) for choice in choices]) > allowed:
        low, high = high, high * 4
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        fits = _cost(choices, [choice.at(middle) for choice in choices]) <= allowed
        low, high = (low, middle) if fits else (middle, high)
    places = [choice.at(high) for choice in choices]
    left = allowed - _cost(choices, places)
    while (step := _best_step(choices, places, left)) is not None:
        layer, place = step
        left -= choices[layer].cost[place] - choices[layer].cost[places[layer]]
        places[layer] = place
    return [choice.options[place] for choice, place in zip(choices, places, strict=True)]


def _cost(choices: Sequence[Choice], places: Sequence[int]) -> float:
    return sum(choice.cost[place] for choice, place in zip(choices, places, strict=True))


def _best_step(choices: Sequence[Choice], places: Sequence[int], left: float) -> tuple[int, int] | None:
    """The layer and its new place that gain the most for what they cost, within what is left."""
    best, found = 0.0, None
    for layer, (choice, now) in enumerate(zip(choices, places, strict=True)):
        for place in range(len(choice.options)):
            more, gain = choice.cost[place] - choice.cost[now], choice.lost[now] - choice.lost[place]
            if 0 < more <= left and gain / more > best:
                best, found = gain / more, (layer, place)
    return found
