"""The stored matrices of a program that a sparse kernel may multiply by, and what is true of their zeros.

A matrix is (outputs, inputs), as in `graphopt.sparsity`. This module knows exported programs only; `Program` keeps the
annotations and looks at them again here when its tensors change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node

from graphopt.arrays import to_numpy
from graphopt.exported import STORED, op_name, stored
from graphopt.sparsity import (
    LEAST_ZEROS,
    UNSTRUCTURED,
    Annotation,
    Format,
    as_matrix,
    conforms,
    fingerprint,
    offence,
    recognise,
)
from graphopt.sparsity import stored as stored_elements

# A weight with fewer zeros than this is dense, and nobody wants to hear about it.
WORTH_MENTIONING = 0.01


@dataclass(frozen=True)
class View:
    """How a call takes a weight: stored (inputs, outputs) or not; of a convolution in groups, the outputs of a group
    (0: all are one group)."""

    outputs_last: bool
    outputs: int = 0


@dataclass(frozen=True)
class Use:
    """A call that multiplies by a weight."""

    call: Node
    view: View


@dataclass(frozen=True, eq=False)
class Weight:
    """A stored tensor that linear layers, matrix products or convolutions multiply by; by its name in the user's model.

    Calls that reach it through a transposition or a copy in another dtype count.
    """

    name: str
    value: Tensor
    uses: tuple[Use, ...]

    def matrices(self) -> Iterator[tuple[View, np.ndarray]]:
        """For each different way in which calls take it: (outputs, inputs) bool, True where it is not zero."""
        kept = to_numpy(self.value != 0)
        for view in dict.fromkeys(use.view for use in self.uses):
            yield view, as_matrix(kept, view.outputs_last)

    def offence(self, form: Format) -> str | None:
        """Why the values do not keep to the format, and where; None where they do."""
        for view, matrix in self.matrices():
            if view.outputs % form.rows:
                return f"blocks of {form.rows} outputs would reach over two groups, which have {view.outputs} each"
            if (found := offence(matrix, form)) is not None:
                row, column, reason = found
                size = "x".join(map(str, matrix.shape))
                return f"row {row}, column {column} of {size} (outputs x inputs): {reason}"
        return None

    def annotation(self, form: Format | None) -> Annotation:
        """With the shares of its values; None: dense. The values keep to the format."""
        _, matrix = next(self.matrices())
        size = max(1, matrix.size)
        density = int(np.count_nonzero(matrix)) / size
        return Annotation(form, density, 1.0 if form is None else stored_elements(matrix, form) / size)

    def found(self) -> Annotation | str | None:
        """What its zeros are; why they are of no use; None where there are hardly any."""
        zeros = 1 - int(torch.count_nonzero(self.value)) / max(1, self.value.numel())
        if zeros == 1:
            return "all of it is zero"
        if zeros < LEAST_ZEROS:
            return f"{zeros:.0%} zeros, of use from {LEAST_ZEROS:.0%} on" if zeros >= WORTH_MENTIONING else None
        views = list(self.matrices())
        form = recognise(views[0][1], views[0][0].outputs)
        if form is None:
            return None
        if not all(view.outputs % form.rows == 0 and conforms(matrix, form) for view, matrix in views[1:]):
            form = UNSTRUCTURED
        return self.annotation(form)

    def refreshed(self, form: Format | None) -> Annotation | None:
        """What is true of it now, where it had `form` before: that still, or another format, or none.

        None, too, where the format leaves nothing out any more.
        """
        if form is None or self.offence(form) is None:
            annotation = self.annotation(form)
            return annotation if form is None or annotation.stored < 1 else None
        found = self.found()
        return found if isinstance(found, Annotation) else None


def weights(exported: ExportedProgram) -> dict[str, Weight]:
    """The weights by name, in the order of the graph's inputs. Buffers that the program updates are none."""
    signature = exported.graph_signature
    mutated = {spec.target for spec in signature.output_specs if spec.kind is OutputKind.BUFFER_MUTATION}
    names = {
        spec.arg.name: spec.target
        for spec in signature.input_specs
        if spec.kind in STORED and spec.target is not None and spec.target not in mutated
    }
    uses: dict[str, list[Use]] = {}
    for node in exported.graph.nodes:
        if node.op != "call_function" or _base(node) not in _OPERANDS:
            continue
        for operand, view in _operands(node):
            source, flipped = _behind(operand)
            if source.name in names:
                turned = View(view.outputs_last != flipped, view.outputs)
                uses.setdefault(source.name, []).append(Use(node, turned))
    values = {name: stored(exported, target) for name, target in names.items() if name in uses}
    return {
        names[name]: Weight(names[name], values[name], tuple(uses[name]))
        for name in names
        if name in uses and values[name].is_floating_point() and values[name].numel()
    }


# The operators that multiply by a matrix: by argument, whether its outputs come last.
_LINEAR: Mapping[int, bool] = {1: False}
_OPERANDS: Mapping[str, Mapping[int, bool]] = {
    "linear": _LINEAR,
    "conv1d": _LINEAR,
    "conv2d": _LINEAR,
    "conv3d": _LINEAR,
    "convolution": _LINEAR,
    "matmul": {0: False, 1: True},
    "mm": {0: False, 1: True},
    "addmm": {1: False, 2: True},
}
_TRANSPOSITIONS = {"t", "numpy_T", "transpose", "permute"}
_COPIES = {"_to_copy", "clone", "detach", "alias", "contiguous", "to"}


def _base(node: Node) -> str:
    return op_name(node).removeprefix("aten.").partition(".")[0]


def _operands(call: Node) -> Iterator[tuple[Node, View]]:
    """The operands that may be weights."""
    op = _base(call)
    for place, last in _OPERANDS[op].items():
        operand = call.args[place] if place < len(call.args) else None
        if not isinstance(operand, Node):
            continue
        shape = operand.meta["val"].shape
        if op.startswith("conv"):
            if op == "convolution" and call.args[6]:  # transposed: (inputs, outputs / groups, ...)
                continue
            source = call.args[0]
            assert isinstance(source, Node)
            groups = source.meta["val"].shape[1 - len(shape)] // shape[1]
            yield operand, View(last, shape[0] // groups if groups > 1 else 0)
        elif len(shape) == 2:
            yield operand, View(last)


def _behind(node: Node) -> tuple[Node, bool]:
    """What a value is a copy of, and whether it is transposed."""
    flipped = False
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        op = _base(node)
        if op in _TRANSPOSITIONS and len(node.meta["val"].shape) == 2:
            flipped ^= op in ("t", "numpy_T") or [int(d) % 2 for d in _dims(node)] == [1, 0]
        elif op not in _COPIES:
            break
        node = node.all_input_nodes[0]
    return node, flipped


def _dims(node: Node) -> list[Any]:
    """The dimensions of the source in the order of the result, of a matrix that is permuted or transposed."""
    if _base(node) == "permute":
        order = node.args[1]
        assert isinstance(order, (list, tuple))
        return list(order)
    first, second = node.args[1:3]
    return [0, 1] if int(first) % 2 == int(second) % 2 else [1, 0]  # type: ignore[arg-type]


# Annotations of a program that changes --------------------------------------------------------------------------------


def ordered(annotations: Mapping[str, Annotation], exported: ExportedProgram) -> dict[str, Annotation]:
    """In the order of the graph's inputs; those of tensors that there are none of are left out."""
    targets = [str(spec.target) for spec in exported.graph_signature.input_specs if spec.kind in STORED]
    return {name: annotations[name] for name in targets if name in annotations}


def carried(
    annotations: Mapping[str, Annotation],
    formats: Mapping[str, Format | None],
    before: ExportedProgram,
    after: ExportedProgram,
) -> dict[str, Annotation]:
    """The annotations of a program after a change of its graph or tensors: those that are still true.

    Only tensors that are others now, or that are multiplied by in another way, are looked at. One that no longer keeps
    to its format gets what is found in it. A tensor that goes on under another name, as tied weights may, and one that
    a pass made of an annotated one by reordering it, keep the annotation.

    Args:
        annotations: of the program before.
        formats: what a pass says of tensors of the new program; these are looked at.
        before, after: the old and the new graph.
    """
    if not annotations and not formats:
        return {}
    old, new = weights(before), weights(after)
    result: dict[str, Annotation] = {}
    for name, form in formats.items():
        if name in new and (annotation := new[name].refreshed(form)) is not None:
            result[name] = annotation
    for name, annotation in annotations.items():
        was = old.get(name)
        now = new.get(name) or (same_memory(new, was.value) if was is not None else None)
        if now is None or now.name in formats:
            continue
        same = was is not None and _storage(was.value) == _storage(now.value) and _views(was) == _views(now)
        if (fresh := annotation if same else now.refreshed(annotation.format)) is not None:
            result[now.name] = fresh
    known = before.state_dict.keys() | before.constants.keys()
    made = [weight for name, weight in new.items() if name not in known and name not in result]
    for weight in made:
        source = _made_of(weight, (old[name] for name in annotations if name in old))
        if source is not None and (fresh := weight.refreshed(annotations[source.name].format)) is not None:
            result[weight.name] = fresh
    return result


def detected(exported: ExportedProgram) -> dict[str, Annotation]:
    """What is found in the values of the weights."""
    return read_back({}, exported)


def read_back(formats: Mapping[str, Format | None], exported: ExportedProgram) -> dict[str, Annotation]:
    """The annotations that a file names, as far as they are true of the values, and what is found in other weights."""
    result: dict[str, Annotation] = {}
    for name, weight in weights(exported).items():
        found = weight.refreshed(formats[name]) if name in formats else weight.found()
        if isinstance(found, Annotation):
            result[name] = found
    return result


def same_memory(known: Mapping[str, Weight], tensor: Tensor) -> Weight | None:
    """The weight that is this very tensor, maybe under another name."""
    return next((weight for weight in known.values() if _storage(weight.value) == _storage(tensor)), None)


def _made_of(weight: Weight, candidates: Iterator[Weight]) -> Weight | None:
    """The weight that this one has the values of, in another order."""
    same_size = [item for item in candidates if item.value.numel() == weight.value.numel()]
    if not same_size:
        return None
    wanted = fingerprint(weight.value)
    return next((item for item in same_size if fingerprint(item.value) == wanted), None)


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _views(weight: Weight) -> set[View]:
    return {use.view for use in weight.uses}
