"""How small or how fast a program shall become."""

from __future__ import annotations

from dataclasses import dataclass

# What may be budgeted: shares of the original, or absolute amounts.
KINDS = ("flops", "macs", "params", "bytes", "latency")


@dataclass(frozen=True)
class Budget:
    """A limit on one quantity of a program.

    `amount` up to 1 is the share that stays ("flops 0.5": half the FLOPs); where `absolute` it is in
    FLOPs, multiply-adds, elements, bytes of parameters or seconds of latency.
    """

    kind: str
    amount: float
    absolute: bool = False

    def __post_init__(self) -> None:
        assert self.kind in KINDS, f"a budget of {self.kind}"
        assert self.amount > 0, f"a budget of {self.amount}"
