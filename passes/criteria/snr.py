"""Signal to noise of weights that are normal distributions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.axes import Axes, Axis
from graphopt.errors import BadOption, Decline
from graphopt.passes.criteria.base import Elementwise, Member, Tally, checked_choice, members, stand_in

if TYPE_CHECKING:
    from graphopt.calibration import Calibration

# So many sigma from zero |w| is w, to the last digit.
_FAR = 9
_MEASURES = ("snr", "magnitude", "mean", "ratio", "exp")


@dataclass(frozen=True)
class Snr(Elementwise):
    """The signal-to-noise ratio of |w| for weights w ~ N(mu, sigma^2), sigma = softplus(rho); of an item the mean.

        E   = mu erf(mu / (sigma sqrt 2)) + sigma sqrt(2 / pi) exp(-mu^2 / (2 sigma^2))      = E|w|
        snr = E / sqrt(mu^2 + sigma^2 - E^2)

    rho is found by name: it is called as mu is, with `spread` in the place of `mean` at the end (`conv1.weight_mu` and
    `conv1.weight_rho`). It is in the program, in `spreads` or in `checkpoint`; preparing a program folds softplus(rho)
    into one constant, so that as a rule it must be given. Without any pair this is an error. Axes that no pair has get
    the norm of their weights; `fallbacks` names them.

    Source: Li et al., "Training Bayesian Neural Networks with Sparse Subspace Variational Inference", ICLR 2024,
    arXiv:2402.11025. Differs: items instead of weights: the mean over all weights of an item, of which both tensors
    lose the same.

    Attributes:
        mean: ends the names of means.
        spread: ends the names of rho.
        measure: "snr"; "magnitude": E; "mean": |mu|; "ratio": |mu| / sigma; "exp": the ratio of exp(rate |w|).
        rate: of "exp".
        spreads: rho by name, for programs that have only means: the module's state_dict will do. Of a weight whose name
            does not end in `mean` it is called as the weight itself.
        checkpoint: the path of a file with that state_dict.
    """

    name: ClassVar[str] = "snr"
    comparable: ClassVar[bool] = True
    mean: str = "mu"
    spread: str = "rho"
    measure: str = "snr"
    rate: float = 1.0
    spreads: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)
    checkpoint: str = ""

    def elements(self, axes: Axes, calibration: Calibration | None) -> Iterator[tuple[Member, Tensor]]:
        """See Elementwise. Both tensors of a pair have the values."""
        checked_choice(self.name, "measure", self.measure, _MEASURES)
        for mean, rho, spread in self._pairs(axes):
            values = measure(mean.tensor, F.softplus(rho.double()), self.measure, self.rate)
            yield mean, values
            if spread is not None:
                yield spread, values

    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """See Criterion."""
        tally = Tally(wanted)
        total, counts = tally.zeros(), tally.zeros()
        for member, values in self.elements(axes, calibration):
            for atom, sums in tally.sums(member.dims, values).items():
                total[atom] += sums
            for atom, sums in tally.sums(member.dims, torch.ones_like(values)).items():
                counts[atom] += sums
        found = {atom: total[atom] / counts[atom] for atom in tally.wanted if bool((counts[atom] > 0).all())}
        return {**found, **stand_in(axes, [atom for atom in tally.wanted if atom not in found], found)}

    def fallbacks(self, axes: Axes, wanted: Sequence[Axis]) -> list[Decline]:
        """See Criterion."""
        tally = Tally(wanted)
        known = {atom for mean, _, _ in self._pairs(axes) for atom in tally.atoms_of(mean.dims)}
        reason = f"{self.name}: none of its weights has a spread; scored by the norm of its weights"
        return [Decline(axes.where(atom), reason) for atom in tally.wanted if atom not in known]

    def _pairs(self, axes: Axes) -> list[tuple[Member, Tensor, Member | None]]:
        """Means with their rho, and the member that this is, where it is one."""
        targets = {s.arg.name: str(s.target) for s in axes.program.exported.graph_signature.input_specs if s.target}
        by_target = {targets[name]: member for member in members(axes) for name in member.names}
        given = self._given()
        found: list[tuple[Member, Tensor, Member | None]] = []
        for target, member in by_target.items():
            is_mean = target.endswith(self.mean)
            name = target.removesuffix(self.mean) + self.spread if is_mean else target
            partner = by_target.get(name) if is_mean else None
            rho = given.get(name, None if partner is None else partner.tensor)
            if rho is None:
                continue
            if rho.shape != member.tensor.shape:
                shapes = f"{list(rho.shape)}, and {target} has {list(member.tensor.shape)}"
                raise BadOption(what=f"{self.name}: {name} has shape {shapes}", way_out="give those of this very model")
            found.append((member, rho.detach(), partner))
        if not found:
            raise BadOption(
                what=f"{self.name}: {axes.program.name} has no weights that are distributions: "
                f"no pair of tensors called ...{self.mean} and ...{self.spread}",
                way_out="it is for Bayesian networks whose program has means and spreads; use another criterion, or "
                "give the names' endings as mean and spread",
            )
        return found

    def _given(self) -> Mapping[str, Tensor]:
        if not self.checkpoint:
            return self.spreads or {}
        try:
            loaded = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever is wrong with the user's file
            reason = str(error).partition("\n")[0]
            way_out = "give the path of a state_dict that torch.save wrote"
            raise BadOption(what=f"{self.name}: {self.checkpoint}: {reason}", way_out=way_out) from error
        return {**{key: v for key, v in loaded.items() if isinstance(v, Tensor)}, **(self.spreads or {})}


def measure(mu: Tensor, sigma: Tensor, how: str = "snr", rate: float = 1.0) -> Tensor:
    """How sure it is that w ~ N(mu, sigma^2) is not zero, element by element; float64, not negative."""
    mu, sigma = mu.double().abs(), sigma.double().clamp_min(torch.finfo(torch.float64).tiny)
    if how == "mean":
        return mu
    if how == "ratio":
        return mu / sigma
    if how == "exp":
        first, second = _moment(mu, sigma, rate), _moment(mu, sigma, 2 * rate)
        return first / (second - first.square()).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    expected = mu * torch.erf(mu / (sigma * math.sqrt(2)))
    expected = expected + sigma * math.sqrt(2 / math.pi) * torch.exp(-mu.square() / (2 * sigma.square()))
    if how == "magnitude":
        return expected
    # |w| varies most where it is far from zero, sigma^2, and least around it; between these rounding is held.
    variance = mu.square() + sigma.square() - expected.square()
    variance = variance.maximum((1 - 2 / math.pi) * sigma.square()).minimum(sigma.square())
    return expected / torch.where(mu > _FAR * sigma, sigma.square(), variance).sqrt()


def _moment(mu: Tensor, sigma: Tensor, rate: float) -> Tensor:
    """E exp(rate |w|)."""
    normal = torch.special.ndtr
    halves = torch.exp(rate * mu) * normal(mu / sigma + rate * sigma)
    halves = halves + torch.exp(-rate * mu) * normal(-mu / sigma + rate * sigma)
    return torch.exp((rate * sigma).square() / 2) * halves
