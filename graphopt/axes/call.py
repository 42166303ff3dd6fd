"""One call of an operator while its axes are inferred: its arguments, and what a rule may do with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import Node

from graphopt.axes import axis as ax
from graphopt.axes import keep as kp
from graphopt.axes.axis import Axis

if TYPE_CHECKING:
    from graphopt.axes.infer import Inference
    from graphopt.axes.signature import Signature, Term

Dims = list[Axis]
# Dimensions of the results of an operator that has several.
Several = list[Any]
# What a literal argument becomes: a number, a node, the extent of an axis, an Offset, or a list of these.
Literal = Any

_MISSING = object()


class GaveUp(Exception):
    """A rule cannot say what this call does; the call's axes are pinned, and the reason is listed."""


class Call:
    """One node, as rules see it. Arguments go by the names of the operator's schema."""

    def __init__(self, node: Node, inference: Inference) -> None:
        self.node = node
        self._inference = inference
        schema = getattr(node.target, "_schema", None)
        self._names = [argument.name for argument in schema.arguments] if schema is not None else []
        self._defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()} if schema else {}

    # Arguments ------------------------------------------------------------------------------------------------------

    @property
    def arguments(self) -> list[Any]:
        """All arguments in the order of the schema, defaults filled in."""
        return [self.arg(name) for name in self._names]

    def has(self, name: str) -> bool:
        """Whether the operator's schema has an argument of that name."""
        return name in self._names

    def arg(self, name: str, default: Any = _MISSING) -> Any:
        """The argument of that name, or its default in the schema."""
        if name in self.node.kwargs:
            return self.node.kwargs[name]
        place = self._names.index(name) if name in self._names else -1
        if 0 <= place < len(self.node.args):
            return self.node.args[place]
        if name in self._defaults:
            return self._defaults[name]
        if default is _MISSING:
            raise GaveUp(f"it has no argument {name}")
        return default

    @property
    def tensors(self) -> list[Node]:
        """The tensor arguments in order, those inside lists included."""
        found: list[Node] = []
        for value in self.arguments:
            items = value if isinstance(value, (list, tuple)) else [value]
            found += [item for item in items if isinstance(item, Node)]
        return found

    def dims(self, value: Any) -> Dims:
        """The axes of a tensor argument; of a number none, as of a tensor without dimensions."""
        if not isinstance(value, Node):
            return []
        if value not in self._inference.dims:
            raise GaveUp(f"{value.name} is no tensor")
        return list(self._inference.dims[value])

    def constant(self, value: Any) -> Tensor | None:
        """The stored tensor that an argument is, where it is the same in every run; None for anything else."""
        return self._inference.constants.get(value) if isinstance(value, Node) else None

    def dim(self, name: str, rank: int) -> int:
        """A literal argument that names a dimension, made non-negative."""
        return int(self.arg(name)) % max(rank, 1)

    def dim_list(self, name: str, rank: int) -> list[int]:
        """A literal argument that names dimensions; all of them where it is empty or None."""
        value = self.arg(name)
        given = [value] if isinstance(value, int) else list(value or range(rank))
        return [place % max(rank, 1) for place in given]

    # Results --------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the (first) result."""
        value = self.node.meta["val"]
        while isinstance(value, (list, tuple)):
            value = value[0]
        return tuple(map(int, value.shape))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all results of an operator that gives several."""
        return [tuple(map(int, value.shape)) if isinstance(value, Tensor) else () for value in self.node.meta["val"]]

    def fresh(self, shape: Iterable[int] | None = None, pin: str | None = None) -> Dims:
        """New axes of these extents; by default of the result's shape."""
        axes = [Axis(size) for size in (self.shape if shape is None else shape)]
        if pin is not None:
            for axis in axes:
                ax.pin(axis, self.because(pin))
        return axes

    # What a rule states ---------------------------------------------------------------------------------------------

    def because(self, reason: str) -> str:
        """A reason for a pin, with the place in the user's source."""
        return f"{reason} ({self._inference.where(self.node)})"

    def pin(self, axis: Axis, reason: str) -> None:
        """`axis` must not shrink."""
        if ax.find(axis).pinned is None and reason not in self._inference.tolerated:
            ax.pin(axis, self.because(reason))

    def unify(self, a: Axis, b: Axis) -> None:
        """Two dimensions agree index by index."""
        ax.unify(a, b)

    def tie(self, xs: Sequence[Axis], ys: Sequence[Axis]) -> None:
        """Two dimensions lists agree one by one, from the last one on."""
        for x, y in zip(reversed(xs), reversed(ys), strict=False):
            if x.extent == y.extent:
                ax.unify(x, y)

    def reshape(self, xs: Sequence[Axis], ys: Sequence[Axis]) -> None:
        """Two lists of dimensions are the same elements in row-major order."""
        ax.match(xs, ys, "product")

    def broadcast(self, groups: Iterable[Sequence[Axis]], shape: Sequence[int]) -> Dims:
        """The dimensions of an elementwise result: aligned from the last one, those of extent 1 stretched."""
        out: list[Axis | None] = [None] * len(shape)
        for dims in groups:
            for place, axis in enumerate(dims, len(shape) - len(dims)):
                if axis.extent != shape[place] or axis.extent == 1:
                    continue
                known = out[place]
                if known is None:
                    out[place] = axis
                else:
                    ax.unify(known, axis)
        return [Axis(size) if axis is None else axis for axis, size in zip(out, shape, strict=True)]

    def literal(self, name: str, value: Literal) -> None:
        """The literal argument `name` states extents: it becomes `value` when axes of this call shrink."""
        self._inference.literals.setdefault(self.node, {})[name] = value

    def retarget(self, target: Any) -> None:
        """When axes of this call shrink, call `target` with all arguments by name instead."""
        self._inference.targets[self.node] = target

    def statistics(self, axis: Axis) -> None:
        """The operator takes statistics over `axis`: when it shrinks they are those of what is kept."""
        self._inference.notes.append((axis, "statistics", self.node))

    def role(self, axis: Axis, role: str) -> None:
        """What `axis` is to this operator: channel, head, ..."""
        self._inference.notes.append((axis, role, self.node))

    def multiple(self, axis: Axis, count: int) -> None:
        """The operator takes only multiples of `count` items of `axis`."""
        self._inference.multiples.append((axis, count, self.node))

    def contracted(self, tensor: Any, place: int) -> None:
        """The operator sums (products) over dimension `place` of a tensor argument."""
        if isinstance(tensor, Node):
            self._inference.sums.setdefault(self.node, []).append((tensor, place))

    def pinned_axis(self, size: int, reason: str) -> Axis:
        """A new axis that must not shrink."""
        return self.fresh([size], pin=reason)[0]

    # Signatures -----------------------------------------------------------------------------------------------------

    def apply(self, signature: Signature) -> Dims | Several:
        """Unify arguments and results as the signature says; gives the result's dimensions."""
        return _Applied(self, signature).outputs()


class _Applied:
    def __init__(self, call: Call, signature: Signature) -> None:
        self.call, self.signature = call, signature
        self.env: dict[str, Axis] = {}
        self.leading: list[Dims] = []
        for name, letter in signature.literals.items():
            self.env[letter] = Axis(int(call.arg(name)))
        given = call.arguments
        pairs = list(zip(signature.inputs, given, strict=False))
        # Two rounds: plain names first, so that the factors of products are known.
        for simple in (True, False):
            for term, value in pairs:
                if isinstance(value, Node):
                    self.bind(term, value, simple)
        for term, value in pairs:
            if isinstance(value, Node):
                self.finish(term, value)
            else:
                assert term.optional, f"{call.node.target}: an argument of {signature.text!r} is missing"
        for name, letter in signature.literals.items():
            call.literal(name, self.env[letter])
        for letter, role in signature.roles.items():
            if letter in self.env:
                call.role(self.env[letter], role)
        for letter, size in signature.bytes_of.items():
            call.multiple(self.env[letter], size // call.node.meta["val"].element_size())

    def split(self, term: Term, dims: Dims) -> tuple[Dims, Dims]:
        at = len(dims) - len(term.dims)
        if at < 0 or (at and not term.ellipsis):
            raise GaveUp(f"a tensor of {len(dims)} dimensions where {len(term.dims)} are usual")
        return dims[:at], dims[at:]

    def bind(self, term: Term, value: Node, simple: bool) -> None:
        for dim, axis in zip(term.dims, self.split(term, self.call.dims(value))[1], strict=True):
            if (len(dim.names) == 1) is not simple or dim.names == ("1",):
                continue
            if simple:
                self.name(dim.names[0], axis)
            else:
                self.call.unify(axis, self.factors(dim.names, axis.extent))

    def name(self, name: str, axis: Axis) -> None:
        known = self.env.setdefault(name, axis)
        if known is not axis and known.extent == axis.extent:
            self.call.unify(known, axis)

    def factors(self, names: tuple[str, ...], total: int) -> Axis:
        """The product of named axes with an extent of `total`; at most one name may be new."""
        unknown = [name for name in names if name not in self.env]
        known = 1
        for name in names:
            known *= self.env[name].extent if name in self.env else 1
        if len(unknown) > 1 or total % known:
            raise GaveUp(f"{' '.join(names)} does not make {total}")
        for name in unknown:
            self.env[name] = Axis(total // known)
        return ax.product([self.env[name] for name in names])

    def finish(self, term: Term, value: Node) -> None:
        dims = self.call.dims(value)
        leading, own = self.split(term, dims)
        if term.ellipsis:
            self.leading.append(leading)
        results = {name for output in self.signature.outputs for dim in output.dims for name in dim.names}
        for place, (dim, axis) in enumerate(zip(term.dims, own, strict=True), len(leading)):
            if dim.pinned:
                self.call.pin(axis, self.signature.reason)
            if dim.statistics:
                self.call.statistics(axis)
            if not results.intersection(dim.names):
                self.call.contracted(value, place)

    def outputs(self) -> Dims | Several:
        values = self.call.node.meta["val"]
        several = isinstance(values, (list, tuple))
        shapes = self.call.shapes if several else [self.call.shape]
        results = [self.output(term, shape) for term, shape in zip(self.signature.outputs, shapes, strict=False)]
        results += [self.call.fresh(shape, pin="result without a rule") for shape in shapes[len(results) :]]
        return results if several else results[0]

    def output(self, term: Term, shape: tuple[int, ...]) -> Dims:
        at = len(shape) - len(term.dims)
        assert at >= 0, f"{self.call.node.target}: {self.signature.text!r} has more dimensions than the result"
        dims = self.call.broadcast(self.leading, shape[:at])
        for dim, size in zip(term.dims, shape[at:], strict=True):
            axis = Axis(size) if dim.names == ("1",) else self.factors(dim.names, size)
            if axis.extent != size:
                raise GaveUp(f"{' '.join(dim.names)} is {axis.extent} before and {size} in the result")
            if dim.pinned:
                self.call.pin(axis, self.signature.reason)
            dims.append(axis)
        return dims


class Offset:
    """A literal: how many items of `axis` in front of item `start` stay. Worked out late, when all is refined.

    Of several items of one extent, such as those of a Choice, as many stay in each; the first stands for all.
    """

    def __init__(self, axis: Axis, start: int) -> None:
        self.axis, self.start = axis, start

    def under(self, keep: kp.Keep) -> int:
        """The offset when only `keep` stays."""
        if not kp.touched(self.axis, keep):
            return self.start
        return int((kp.index(self.axis, keep) < self.start).sum())


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of operators, by their names without namespace and overload."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, f"two rules for {name}"
            RULES[name] = function
        return function

    return register


def extent_of(value: Literal, keep: kp.Keep) -> Any:
    """What a literal becomes under `keep`; see Literal."""
    if isinstance(value, Axis):
        return kp.extent(value, keep)
    if isinstance(value, list):
        return [extent_of(item, keep) for item in value]
    if isinstance(value, Offset):
        return value.under(keep)
    return value


__all__ = ["RULES", "Call", "Dims", "GaveUp", "Literal", "Offset", "Rule", "Several", "extent_of", "rule"]
