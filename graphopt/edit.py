"""A program while a pass changes it: the graph, its tensors and its signature, kept consistent with each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from graphopt.errors import Decline
from graphopt.exported import STORED, copy_exported, output_names, stored
from graphopt.place import place
from graphopt.program import Program
from graphopt.sparsity import Format
from graphopt.spec import identifier

_KEPT_META = ("nn_module_stack", "stack_trace")


class Edit:
    """A copy of a program's graph to be changed at will; `finish` makes a valid ExportedProgram of it.

    Weight tensors are shared with the original, so they are replaced, never written to.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.exported = copy_exported(program.exported)
        self.graph = self.exported.graph
        self.changed: Counter[str] = Counter()
        self.declined: list[Decline] = []
        self.notes: list[str] = []
        self.details: list[dict[str, Any]] = []
        self.formats: dict[str, Format | None] = {}
        self.inserted: list[Node] = []  # by `call`
        self.examples: dict[str, Tensor] = {}  # of inputs that are new
        signature = self.exported.graph_signature
        self._specs = {spec.arg.name: spec for spec in signature.input_specs}
        mutated = {spec.target for spec in signature.output_specs if spec.kind is OutputKind.BUFFER_MUTATION}
        self._mutated = {name for name, spec in self._specs.items() if spec.target in mutated}
        values = [node.meta.get("val") for node in self.graph.nodes if node.op == "placeholder"]
        self._fake = detect_fake_mode(values) or torch._subclasses.FakeTensorMode()

    def count(self, what: str) -> None:
        """Note one change of a kind."""
        self.changed[what] += 1

    def decline(self, node: Node, reason: str) -> None:
        """Note that a rule looked at `node` and did not apply."""
        self.declined.append(Decline(place(node), reason))

    def note(self, text: str) -> None:
        """Say something that whoever asked for the pass should read without asking."""
        self.notes.append(text)

    def annotate(self, target: str, form: Format | None) -> None:
        """Say what the zeros of a weight are, once the pass is done (None: it is to be taken as dense).

        What is not true of its values then is not believed: it gets the format that is found, or none.
        """
        self.formats[target] = form

    # Tensors of the program -----------------------------------------------------------------------------------------

    def tensor(self, node: object) -> Tensor | None:
        """The tensor behind a placeholder, where it is the same in every run; None for anything else."""
        if not isinstance(node, Node) or node.op != "placeholder" or node.name in self._mutated:
            return None
        spec = self._specs[node.name]
        return stored(self.exported, spec.target) if spec.kind in STORED and spec.target is not None else None

    def is_stored(self, node: Node) -> bool:
        """Whether a placeholder stands for a tensor of the program rather than for an input of the user's."""
        return node.op == "placeholder" and self._specs[node.name].kind in STORED

    def is_mutated(self, node: Node) -> bool:
        """Whether a placeholder stands for a buffer that the program updates."""
        return node.name in self._mutated

    def target(self, node: Node) -> str:
        """The name of the tensor behind a placeholder, such as `layer3.0.conv2.weight`."""
        return str(self._specs[node.name].target)

    def add_tensor(self, target: str, value: Tensor, *, parameter: bool) -> Node:
        """Give the program one more tensor; `target` becomes its name, made unique. Returns its placeholder."""
        taken = self.exported.state_dict.keys() | self.exported.constants.keys()
        unique, count = target, 1
        while unique in taken:
            count += 1
            unique = f"{target}_{count}"
        kind = InputKind.PARAMETER if parameter else InputKind.CONSTANT_TENSOR
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        # In front of the first input that is of another kind and behind: parameters, buffers, constants, user inputs.
        order = [InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR]
        later = [n for n in inputs if self._rank(self._specs[n.name].kind, order) > self._rank(kind, order)]
        anchor = later[0] if later else next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(anchor):
            node = self.graph.placeholder(("p_" if parameter else "c_") + identifier(unique.replace(".", "_")))
        spec = InputSpec(kind=kind, arg=TensorArgument(name=node.name), target=unique)
        self._specs[node.name] = spec
        self._store(node, value)
        return node

    def set_tensor(self, node: Node, value: Tensor) -> None:
        """Put another tensor behind a placeholder."""
        self._store(node, value)

    @staticmethod
    def _rank(kind: InputKind, order: list[InputKind]) -> int:
        return order.index(kind) if kind in order else len(order)

    def _store(self, node: Node, value: Tensor) -> None:
        spec = self._specs[node.name]
        assert spec.target is not None
        value = value.detach().contiguous()
        if spec.kind is InputKind.PARAMETER:
            value = nn.Parameter(value, requires_grad=False)
        if spec.kind is InputKind.CONSTANT_TENSOR or spec.persistent is False:
            self.exported.constants[spec.target] = value
        else:
            self.exported.state_dict[spec.target] = value
        node.meta["val"] = self._fake.from_tensor(value.detach(), static_shapes=True)

    # Inputs and outputs ----------------------------------------------------------------------------------------------

    def make_input(self, node: Node, name: str) -> Node:
        """Let a stored tensor be one more input of the user's, by that name; what it was is the example of it.

        Returns the input's placeholder, in the place of the tensor's. Names must be new, and identifiers.
        """
        value = stored(self.exported, self.target(node)).detach()
        last = [each for each in self.graph.nodes if each.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            new = self.graph.placeholder(name)
        assert new.name == name, f"{name} is taken"
        new.meta["val"] = node.meta["val"]
        self.replace(node, new)
        argument = TensorArgument(name=name)
        self._specs[name] = InputSpec(kind=InputKind.USER_INPUT, arg=argument, target=None)
        self.examples[name] = value
        top = self.exported.module_call_graph[0].signature
        assert top is not None
        top.inputs.append(argument)
        args, kwargs = pytree.tree_unflatten([0] * top.in_spec.num_leaves, top.in_spec)
        top.in_spec = pytree.tree_structure((args, {**kwargs, name: 0}))
        if top.forward_arg_names is not None:  # those of the original forward method, which takes it now by name
            top.forward_arg_names = [*top.forward_arg_names, name]
        if self.exported.example_inputs is not None:
            given, named = self.exported.example_inputs
            self.exported.example_inputs = (given, {**named, name: value})
        return new

    def add_outputs(self, nodes: Mapping[str, Node]) -> None:
        """Let the program give more, by these names; all of its outputs are given by name then."""
        output = self.graph.output_node()
        top = self.exported.module_call_graph[0].signature
        assert top is not None
        for node in nodes.values():
            argument = TensorArgument(name=node.name)
            spec = OutputSpec(kind=OutputKind.USER_OUTPUT, arg=argument, target=None)
            self.exported.graph_signature.output_specs.append(spec)
            top.outputs.append(argument)
        results: Any = output.args[0]
        output.args = ((*results, *nodes.values()),)
        top.out_spec = pytree.tree_structure(dict.fromkeys([*output_names(top.out_spec), *nodes], 0))

    # Nodes ----------------------------------------------------------------------------------------------------------

    def call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, like: Node) -> Node:
        """Insert a call in front of `like`, with its place in the user's source."""
        with self.graph.inserting_before(like):
            node = self.graph.call_function(target, args, dict(kwargs or {}))
        node.meta = {key: like.meta[key] for key in _KEPT_META if key in like.meta}
        self.infer(node)
        self.inserted.append(node)
        return node

    def infer(self, node: Node) -> None:
        """Work out shape, dtype and strides of a call from those of its inputs."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda i: i.meta["val"])
        shapes = self._fake.shape_env
        # A size that is known only at run time (x[mask], which a check counts) is a new symbol each time. No node is
        # bound to it here, and torch would miss that in the next program that it traces.
        ignored = shapes.ignore_fresh_unbacked_symbols() if shapes is not None else nullcontext()
        with self._fake, torch.no_grad(), ignored:
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]

    def replace(self, node: Node, new: Node) -> None:
        """Let every user of `node` take `new`, and erase `node`."""
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def finish(self) -> ExportedProgram:
        """Bring signature and code in line with the graph, and validate. Raises what torch finds wrong."""
        signature = self.exported.graph_signature
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        signature.input_specs = [self._specs[node.name] for node in inputs]
        results = self.graph.output_node().args[0]
        assert isinstance(results, (list, tuple))
        for spec, result in zip(signature.output_specs, results, strict=True):
            if isinstance(result, Node):
                spec.arg = TensorArgument(name=result.name)
        kept = {spec.target for spec in signature.input_specs}
        for tensors in (self.exported.state_dict, self.exported.constants):
            for target in [key for key in tensors if key not in kept]:
                del tensors[target]
        self.graph.lint()
        self.exported.graph_module.recompile()
        self.exported.validate()
        return self.exported


def is_pure(node: Node) -> bool:
    """Whether a call gives the same values for the same inputs and does nothing else."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") in ("_operator", "math")
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not random and not target._schema.is_mutable and "empty" not in target.__name__ + target._schema.name


def is_random(node: Node) -> bool:
    """Whether a call draws random numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
