"""Reading an ExportedProgram: names and kinds of inputs and outputs, example inputs, a listing, a copy."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from graphopt.spec import TensorSpec, dtype_name, identifier

# Inputs of the graph that are not the user's: tensors that belong to the program.
STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@contextmanager
def _quiet_copies() -> Iterator[None]:
    """Copying torch's own pytree specs raises a warning about torch's own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def decomposed(exported: ExportedProgram, table: dict[Any, Any]) -> ExportedProgram:
    """The program with operators replaced as the table says, functional and without sub-graphs in any case."""
    with _quiet_copies(), torch.no_grad():
        return exported.run_decompositions(table)


def copy_exported(exported: ExportedProgram, graph: Graph | None = None) -> ExportedProgram:
    """A copy with a graph and signature of its own, or with `graph`; the weight tensors are shared."""
    with _quiet_copies():
        calls = copy.deepcopy(exported.module_call_graph)
        copied = copy.deepcopy(exported.graph) if graph is None else graph
    if graph is None:
        # fx renames what is called like a builtin (an argument named `input`); the signature knows the old name.
        for old, new in zip(exported.graph.nodes, copied.nodes, strict=True):
            new.name = old.name
    return ExportedProgram(
        root=GraphModule(exported.graph_module, copied),
        graph=copied,
        graph_signature=copy.deepcopy(exported.graph_signature),
        state_dict=dict(exported.state_dict),
        range_constraints=dict(exported.range_constraints),
        module_call_graph=calls,
        example_inputs=exported.example_inputs,
        constants=dict(exported.constants),
        verifiers=list(exported.verifiers),
    )


def stored(exported: ExportedProgram, target: str) -> Tensor:
    """The parameter, buffer or constant that an input of the graph stands for."""
    return exported.state_dict[target] if target in exported.state_dict else exported.constants[target]


def input_specs(exported: ExportedProgram) -> Iterator[TensorSpec]:
    """The user's inputs that are tensors, in order."""
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument):
            value = values[spec.arg.name]
            yield TensorSpec(spec.arg.name, tuple(map(int, value.shape)), dtype_name(value.dtype))


def user_output_places(exported: ExportedProgram) -> list[int]:
    """Where the tensors that the user gets stand in the graph's output tuple."""
    return [
        place
        for place, spec in enumerate(exported.graph_signature.output_specs)
        if spec.kind is OutputKind.USER_OUTPUT and isinstance(spec.arg, TensorArgument)
    ]


def output_specs(exported: ExportedProgram) -> Iterator[TensorSpec]:
    """The outputs that the user gets and that are tensors, in order."""
    specs = exported.graph_signature.output_specs
    users = [place for place, spec in enumerate(specs) if spec.kind is OutputKind.USER_OUTPUT]
    names = dict(zip(users, output_names(exported.call_spec.out_spec), strict=True))
    results = exported.graph.output_node().args[0]
    for place in user_output_places(exported):
        value = results[place].meta["val"]
        yield TensorSpec(names[place], tuple(map(int, value.shape)), dtype_name(value.dtype))


def output_names(spec: pytree.TreeSpec | None) -> list[str]:
    """One identifier per leaf of what the model returns, all different."""
    if spec is None:
        return []
    names: list[str] = []
    for path in _paths(spec):
        name = base = identifier("_".join(path) if path and not path[0].isdigit() else "_".join(("output", *path)))
        count = 1
        while name in names:
            count += 1
            name = f"{base}_{count}"
        names.append(name)
    return names


def keys_of(spec: pytree.TreeSpec) -> list[str] | None:
    """The keys of a mapping-like node (dict, named tuple, transformers.ModelOutput); None for lists and tuples."""
    kind, context, size = spec.type, spec.context, spec.num_children
    if isinstance(context, (list, tuple)) and context and all(isinstance(key, str) for key in context):
        return list(context) if len(context) == size else None
    fields = getattr(kind, "_fields", None) or getattr(context, "_fields", None)
    return list(fields) if fields and len(fields) == size else None


def _paths(spec: pytree.TreeSpec) -> Iterator[tuple[str, ...]]:
    if spec.is_leaf():
        yield ()
        return
    keys = keys_of(spec) or [str(place) for place in range(spec.num_children)]
    for key, child in zip(keys, spec.children(), strict=True):
        for path in _paths(child):
            yield (key, *path)


def arguments(exported: ExportedProgram, given: Mapping[str, Tensor]) -> Iterator[Any]:
    """What the graph module takes: stored tensors, the user's tensors by name, constants."""
    for spec in exported.graph_signature.input_specs:
        if spec.kind in STORED and spec.target is not None:
            yield stored(exported, spec.target)
        elif isinstance(spec.arg, ConstantArgument):
            yield spec.arg.value
        else:
            yield given[spec.arg.name]


def examples_of(exported: ExportedProgram) -> dict[str, Tensor] | None:
    """The example inputs that the program was exported with, by name; None where there are none."""
    if exported.example_inputs is None:
        return None
    args, kwargs = exported.example_inputs
    order = exported.call_spec.in_spec.children()[1].context or []
    flat = pytree.tree_leaves((args, {key: kwargs[key] for key in order}))
    names = [spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    pairs = zip(names, flat, strict=True)
    return {name: value.detach() for name, value in pairs if isinstance(value, Tensor)}


def example_arguments(exported: ExportedProgram, examples: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """The example inputs as the args and kwargs of the original forward method."""
    flat = [
        spec.arg.value if isinstance(spec.arg, ConstantArgument) else examples[spec.arg.name]
        for spec in exported.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    ]
    return pytree.tree_unflatten(flat, exported.call_spec.in_spec)


def listing(exported: ExportedProgram) -> Iterator[str]:
    """One line per node that computes: name, operator with its arguments, shape and dtype of the result."""
    targets = {spec.arg.name: spec.target for spec in exported.graph_signature.input_specs if spec.target}

    def show(value: Any) -> str:
        if isinstance(value, Node):
            return targets.get(value.name, value.name)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(show, value))}]"
        return dtype_name(value) if isinstance(value, torch.dtype) else str(value)

    for node in exported.graph.nodes:
        if node.op == "call_function":
            arguments = [show(value) for value in node.args]
            arguments += [f"{key}={show(value)}" for key, value in node.kwargs.items()]
            yield f"{node.name} = {op_name(node)}({', '.join(arguments)})  {_kind(node.meta.get('val'))}".rstrip()


def op_name(node: Node) -> str:
    """`aten.conv2d` for torch.ops.aten.conv2d.default, with the overload where it is not the default one."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)}[{','.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_kind, value))})"
    return ""
