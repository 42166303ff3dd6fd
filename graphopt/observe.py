"""What a program does on calibration data: values inside it, and gradients. What the criteria are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Interpreter, Node

from graphopt.calibration import Calibration
from graphopt.errors import BadLabels
from graphopt.exported import arguments, op_name, user_output_places
from graphopt.program import Program

# PyTorch's own label for what is not to be looked at.
_IGNORED = -100

Loss = Callable[[dict[str, Tensor], Tensor | None], Tensor]


# Values --------------------------------------------------------------------------------------------------------------


def watch(
    program: Program,
    calibration: Iterable[Mapping[str, Tensor]],
    nodes: Iterable[Node | str],
    see: Callable[[str, Any], None],
) -> None:
    """Run the program on each batch and hand over the wanted values as they appear.

    Values live only as long as the program needs them, and it runs no further than to the last that is wanted.

    Args:
        program: runs in inference mode; it does not change.
        calibration: batches as `Program.run` takes them, such as a Calibration.
        nodes: nodes of `program.graph` or their names; placeholders, too.
        see: called with a node's name and value (a tensor; a tuple of them for a split) once a batch. Keep what you
            make of the value rather than the value.

    Raises:
        KeyError: there is no node of that name.
    """
    wanted = _names(program, nodes)

    class Watcher(_Runner):
        left: set[str]

        def run_node(self, node: Node) -> Any:
            value = super().run_node(node)
            if node.name in self.left:
                see(node.name, value)
                self.left.remove(node.name)
                if not self.left:
                    raise _SeenAll
            return value

    with torch.inference_mode():
        for batch in calibration:
            runner = Watcher(program)
            runner.left = set(wanted)
            if wanted:
                try:
                    runner.run(*arguments(program.exported, batch))
                except _SeenAll:
                    continue


def activations(
    program: Program,
    calibration: Iterable[Mapping[str, Tensor]],
    nodes: Iterable[Node | str],
    reduce: Callable[[Any], Any] | None = None,
) -> dict[str, list[Any]]:
    """What `reduce` makes of each wanted value, by node name, one entry a batch; the whole values where it is None.

    Raises as `watch`, which is what sums over batches are made with.
    """
    found: dict[str, list[Any]] = {name: [] for name in _names(program, nodes)}
    watch(program, calibration, found, lambda name, value: found[name].append(reduce(value) if reduce else value))
    return found


# Gradients -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradients:
    """Of one batch, or of one sample of it.

    `of` has the gradient of every wanted tensor by its node's name: zeros where the loss does not depend on it, and for
    the running statistics of batch norms. `values` has the values of those among them that are not stored in the
    program. Tensors that are tied under two names have one gradient each, and the sum of these is that of the tensor.
    """

    loss: float
    of: Mapping[str, Tensor]
    values: Mapping[str, Tensor]


def gradients(
    program: Program,
    calibration: Calibration,
    loss: str | Loss = "auto",
    *,
    wanted: Iterable[Node | str] | None = None,
    per_sample: bool = False,
    seed: int = 0,
) -> Iterator[Gradients]:
    """Gradients of a loss, batch by batch, so that memory holds those of one batch.

    Args:
        program: runs as it is, in eval mode; it does not change.
        calibration: batches, and labels where the loss wants some.
        loss: a function of the outputs by name and the batch's labels (or None) to a scalar, or to one number for each
            sample, whose mean is taken; or one of
            * "labels": whole labels are classes of the first floating-point output, (b, classes), (b, n, classes) or
              (b, classes, h, w): cross-entropy, where the program ends with a softmax as well; labels that are numbers
              of the output's shape: squared error.
            * "distill": the program is to give what it gives, with normal noise added: half the squared error,
              relative to the output's size. No gradient is left without the noise. The expectation over batches of
              (gradient . change of the tensors)^2 for one sample is then the squared relative change of the output to
              first order, summed over the floating-point outputs (the Fisher information of a normal distribution).
            * "fisher": cross-entropy against labels drawn from the softmax of the first floating-point output over its
              last dimension: the expectation of the squared gradient is the Fisher information (arXiv:1412.1193).
            * "auto": "labels" where there are some, else "distill".
        wanted: nodes or names of floating-point values: stored tensors by placeholder name, inputs, or values inside
            the graph. All stored floating-point tensors where None.
        per_sample: give the gradients of each sample's loss instead of those of the batch's mean; as many backward
            passes as the batch has samples. The loss must give one number for each. Samples must not mix in the
            program.
        seed: of what is drawn; the same seed gives the same gradients.

    Raises:
        BadLabels: "labels" is asked for and they do not fit the output, or there are none.
        KeyError: there is no such node, or no such loss.
    """
    names = [n for n, t in program.tensors.items() if t.is_floating_point()] if wanted is None else None
    names = _names(program, wanted or ()) if names is None else names
    known = calibration.labels is not None
    chosen = ("labels" if known else "distill") if loss == "auto" else loss
    own = partial(_LOSSES[chosen], program, calibration.origin) if isinstance(chosen, str) else None
    labels = calibration.labels or (None,) * len(calibration)
    for place, (batch, right) in enumerate(zip(calibration, labels, strict=True)):
        generator = torch.Generator().manual_seed(seed + place)
        # Not around the yields: between these the mode is the caller's.
        with _differentiable():
            runner = _Recorder(program, set(names))
            results = runner.run(*arguments(program.exported, batch))
            places = user_output_places(program.exported)
            outputs = {spec.name: results[at] for spec, at in zip(program.outputs, places, strict=True)}
            losses = own(outputs, right, generator) if own else chosen(outputs, right)  # type: ignore[operator]
            if losses.ndim > 1 or (per_sample and losses.ndim == 0):
                raise ValueError("a loss gives a scalar or one number for each sample, and with per_sample these")
            parts = list(losses) if per_sample else [losses.mean()]
        sources = [runner.found[name] for name in names]
        values = {name: value.detach() for name, value in runner.found.items() if name not in program.tensors}
        for count, part in enumerate(parts, 1):
            grads = _grads(part, sources, keep=count < len(parts))
            yield Gradients(part.item(), dict(zip(names, grads, strict=True)), values)


@contextmanager
def _differentiable() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _grads(loss: Tensor, sources: list[Tensor], *, keep: bool) -> tuple[Tensor, ...]:
    if not loss.requires_grad:
        return tuple(map(torch.zeros_like, sources))
    with _differentiable():
        return torch.autograd.grad(loss, sources, retain_graph=keep, allow_unused=True, materialize_grads=True)


class _SeenAll(Exception):
    """Ends a run when nothing is wanted any more."""


class _Runner(Interpreter):
    def __init__(self, program: Program) -> None:
        super().__init__(program.exported.graph_module)


class _Recorder(_Runner):
    """Runs with gradients for the wanted values, and keeps these."""

    def __init__(self, program: Program, wanted: set[str]) -> None:
        super().__init__(program)
        self.wanted = wanted
        self.found: dict[str, Tensor] = {}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten._native_batch_norm_legit_no_training.default:
            # It has no gradient for the running statistics, and refuses such as want one.
            args = (*args[:3], args[3].detach(), args[4].detach(), *args[5:])
        return super().call_function(target, args, kwargs)

    def run_node(self, node: Node) -> Any:
        value = super().run_node(node)
        if node.op == "placeholder" and isinstance(value, Tensor):
            value = value.detach()
            value = value.clone() if value.is_inference() else value
        if node.name in self.wanted:
            assert isinstance(value, Tensor), f"{node.name} is not a single tensor"
            self.found[node.name] = value if value.requires_grad else value.requires_grad_()
        return value


def _names(program: Program, nodes: Iterable[Node | str]) -> list[str]:
    known = {node.name for node in program.graph.nodes}
    names = [node.name if isinstance(node, Node) else node for node in nodes]
    if unknown := [name for name in names if name not in known]:
        raise KeyError(f"{program.name} has no node {', '.join(unknown)}")
    return names


# Losses --------------------------------------------------------------------------------------------------------------


def _labelled(
    program: Program, origin: str, outputs: dict[str, Tensor], labels: Tensor | None, generator: torch.Generator
) -> Tensor:
    name, output = _first(outputs)

    def refuse(what: str) -> BadLabels:
        return BadLabels(source=origin, what=what, output=f"{name}: {list(output.shape)}")

    if labels is None:
        raise refuse("has no labels")
    if labels.is_floating_point():
        if labels.numel() != output.numel() or labels.shape[:1] != output.shape[:1]:
            raise refuse(f"labels of shape {list(labels.shape)} are numbers, not {list(output.shape)} of them")
        return _per_sample((output - labels.reshape(output.shape)).square())
    logits = _logits(program, name, output)
    if output.ndim > 1 and labels.shape == output.shape[:-1]:
        logits = logits.movedim(-1, 1)
    elif output.ndim < 2 or labels.shape != (output.shape[0], *output.shape[2:]):
        raise refuse(f"labels of shape {list(labels.shape)} do not fit the output {name}, {list(output.shape)}")
    if (most := int(labels.max())) >= logits.shape[1]:
        raise refuse(f"there is a label {most}, and the output {name} has {logits.shape[1]} classes")
    if bool(((labels < 0) & (labels != _IGNORED)).any()):
        raise refuse(f"there is a label {int(labels.min())}; classes are counted from 0, and {_IGNORED} is left out")
    return _per_sample(F.cross_entropy(logits, labels.long(), reduction="none"))


def _distill(
    program: Program, origin: str, outputs: dict[str, Tensor], labels: Tensor | None, generator: torch.Generator
) -> Tensor:
    _first(outputs)
    losses = []
    for output in outputs.values():
        if not output.is_floating_point():
            continue
        # The noise has the size of the output as a whole, so that the loss is relative to that.
        size = output.detach().square().mean().sqrt().clamp_min(torch.finfo(output.dtype).tiny)
        scale = size * (output[0].numel() if output.ndim else 1) ** 0.5
        noise = torch.randn(output.shape, generator=generator).to(output.dtype) * scale
        losses.append(_per_sample(((output - (output.detach() + noise)) / scale).square() / 2, mean=False))
    if any(loss.shape != losses[0].shape for loss in losses):
        losses = [loss.mean() for loss in losses]
    return torch.stack(losses).sum(0)


def _fisher(
    program: Program, origin: str, outputs: dict[str, Tensor], labels: Tensor | None, generator: torch.Generator
) -> Tensor:
    name, output = _first(outputs)
    log = _logits(program, name, output).log_softmax(-1)
    probabilities = log.detach().exp().flatten(0, -2) if output.ndim > 1 else log.detach().exp()[None]
    drawn = torch.multinomial(probabilities.float(), 1, generator=generator).reshape(*output.shape[:-1], 1)
    return _per_sample(-log.gather(-1, drawn))


_LOSSES = {"labels": _labelled, "distill": _distill, "fisher": _fisher}


def _first(outputs: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    found = next(((name, output) for name, output in outputs.items() if output.is_floating_point()), None)
    assert found is not None, "the program has no floating-point output, so nothing has a gradient"
    return found


def _per_sample(losses: Tensor, *, mean: bool = True) -> Tensor:
    """One number for each sample, which is what stands in front."""
    if losses.ndim < 2:
        return losses
    return losses.flatten(1).mean(1) if mean else losses.flatten(1).sum(1)


def _logits(program: Program, name: str, output: Tensor) -> Tensor:
    """The output as cross-entropy takes it: the logarithm where the program ends with a softmax."""
    at = [spec.name for spec in program.outputs].index(name)
    results: Any = program.graph.output_node().args[0]
    node = results[user_output_places(program.exported)[at]]
    if op_name(node) in ("aten.softmax.int", "aten._softmax"):
        return output.clamp_min(torch.finfo(output.dtype).tiny).log()
    return output
