"""What a program costs as a function of its axes: polynomials in the extents of those that may be shrunk.

`cost_model(axes).at(sizes)` is `summary(shrink(axes, keep)).total` where `keep` leaves `sizes` items, exactly, and
without shrinking anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.fx import Node

from graphopt.axes import Axes, Axis, results_of
from graphopt.cost.formulas import Extent, Shaped, counts, numbers
from graphopt.cost.memory import Memory, memory_of
from graphopt.cost.polynomial import Compiled, Polynomial, Sizes, sizes_of
from graphopt.cost.table import Cost, parameter_uses
from graphopt.exported import op_name
from graphopt.place import place

KEYS = ("flops", "macs", "params", "bytes_read", "bytes_written")


@dataclass(frozen=True, eq=False)
class ModelRow:
    """One call: its node, where it comes from in the user's names, its operator, and its cost by each of KEYS."""

    node: Node
    where: str
    op: str
    cost: Mapping[str, Polynomial]

    @property
    def name(self) -> str:
        """The node's name, which is the same in a shrunk program."""
        return self.node.name

    def at(self, sizes: Sizes | None = None) -> Cost:
        """The cost of this call where axes have these sizes."""
        given = sizes_of(sizes or {})
        return Cost(**{key: self.cost[key](given) for key in KEYS})


@dataclass(frozen=True, eq=False)
class CostModel:
    """The cost of a program by the extents of its axes; those that a mapping of sizes leaves out are whole.

    `total` has polynomials for flops, macs, params (elements, each stored parameter once), bytes_read, bytes_written,
    their sum bytes (moved, without fusion), and stored_bytes (of parameters, buffers and constants).
    """

    axes: Axes
    rows: tuple[ModelRow, ...]
    total: Mapping[str, Polynomial]
    shapes: Mapping[Node, tuple[Shaped, ...]]

    @cached_property
    def variables(self) -> tuple[Axis, ...]:
        """The atoms that any cost depends on, in the order of the program."""
        used = {atom for polynomial in self.total.values() for atom in polynomial.variables}
        used |= {atom for polynomial in self.memory.storages for atom in polynomial.variables}
        return tuple(atom for atom in self.axes.atoms if atom in used)

    @cached_property
    def memory(self) -> Memory:
        """When which results are alive."""
        return memory_of(self.axes.program, lambda node: self.shapes.get(node, ()))

    def at(self, sizes: Sizes | None = None) -> Cost:
        """The cost of the program where axes have these sizes.

        Raises:
            ValueError: a size is out of range, or an axis is no atom.
        """
        given = sizes_of(sizes or {})
        return Cost(**{key: self.total[key](given) for key in KEYS})

    def stored_bytes(self, sizes: Sizes | None = None) -> int:
        """Bytes of all stored tensors."""
        return self.total["stored_bytes"](sizes_of(sizes or {}))

    def peak_memory(self, sizes: Sizes | None = None) -> int:
        """Bytes of results that are alive at once, at most; see `Memory`."""
        return self.memory.peak(sizes_of(sizes or {}))

    def compiled(self, keys: Sequence[str] = ("flops",), variables: Sequence[Axis] | None = None) -> Compiled:
        """Totals ready for fast evaluation at many sizes, as functions of `variables` (by default all).

        Variables that are left out must be ones that the totals do not depend on.
        """
        return Compiled([self.total[key] for key in keys], self.variables if variables is None else variables)

    def compiled_rows(self, key: str, variables: Sequence[Axis] | None = None) -> Compiled:
        """As `compiled`, one value for each of `rows`."""
        return Compiled([row.cost[key] for row in self.rows], self.variables if variables is None else variables)


def cost_model(axes: Axes) -> CostModel:
    """The cost of `axes.program` as polynomials in the extents of its atoms that are not pinned."""
    shapes = {node: _shaped(node, axes.dims.get(node)) for node in axes.program.graph.nodes}
    rows, sums = [], {key: list[Polynomial]() for key in KEYS}
    for node, fresh in parameter_uses(axes.program):
        found = counts(node, lambda each: shapes[each])
        cost = {key: _polynomial(getattr(found, key)) for key in KEYS if key != "params"}
        cost["params"] = Polynomial.sum(tensor.numel for source in fresh for tensor in shapes[source])
        rows.append(ModelRow(node, place(node), op_name(node), cost))
        for key in KEYS:
            sums[key].append(cost[key])
    total = {key: Polynomial.sum(values) for key, values in sums.items()}
    total["bytes"] = total["bytes_read"] + total["bytes_written"]
    total["stored_bytes"] = _stored_bytes(axes, shapes)
    return CostModel(axes, tuple(rows), total, shapes)


def _polynomial(value: Extent) -> Polynomial:
    return value if isinstance(value, Polynomial) else Polynomial(value)


def _shaped(node: Node, dims: Any) -> tuple[Shaped, ...]:
    """The results of a node with extents by axis; as they are where nothing is known of their axes."""
    plain = tuple(numbers(node))
    known = results_of(dims) if dims else []
    if [len(own) for own in known] != [len(result.shape) for result in plain]:
        return plain
    return tuple(
        Shaped(tuple(Polynomial.of(axis) for axis in own), result.item_bytes)
        for own, result in zip(known, plain, strict=True)
    )


def _stored_bytes(axes: Axes, shapes: Mapping[Node, tuple[Shaped, ...]]) -> Polynomial:
    """As Program.parameters_bytes counts: tensors that share storage once.

    A tensor that shrinks gets a storage of its own, shared by those that were the same tensor.
    """
    sizes: dict[Any, Extent] = {}
    for node in axes.program.graph.nodes:
        if node.op != "placeholder" or not node.users or node.name not in axes.program.tensors:
            continue
        tensor, shaped = axes.program.tensors[node.name], shapes[node][0]
        storage = tensor.untyped_storage()
        if any(isinstance(extent, Polynomial) and extent.variables for extent in shaped.shape):
            sizes[storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()] = shaped.bytes
        else:
            sizes[storage.data_ptr()] = storage.nbytes()
    return Polynomial.sum(sizes.values())
