"""A program as an nn.Module that can be trained with anything that trains modules, and back again.

`ExportedProgram.module()` does not serve: it shares the program's tensors, all frozen, refuses `train()`, leaves
constants where they are when the module moves, and takes arguments only in the very form of the capture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from graphopt.cost import summary
from graphopt.errors import NotFromProgram, StateMismatch, WrongInputs
from graphopt.exported import STORED, copy_exported, stored
from graphopt.program import Program
from graphopt.record import Record

RECORD = "fine-tune"

_aten = torch.ops.aten
# All of these take (input, p, train).
_DROPOUTS = (
    _aten.dropout.default,
    _aten.feature_dropout.default,
    _aten.alpha_dropout.default,
    _aten.feature_alpha_dropout.default,
    _aten.native_dropout.default,
)
_Mode = Callable[["TrainableModule"], Any]


class TrainableModule(nn.Module):
    """A program's graph with parameters and buffers of its own; `Program.to_module` makes one and says what it does."""

    def __init__(self, program: Program, *, keep_zeros: bool = False) -> None:
        super().__init__()
        exported = program.exported
        self._origin = _Origin(program)
        self._stored: dict[str, str] = {}  # dotted names by placeholder
        signature = exported.graph_signature
        made: dict[tuple[Any, ...], nn.Parameter | nn.Buffer] = {}
        for spec in signature.input_specs:
            if spec.kind in STORED and spec.target is not None:
                value = stored(exported, spec.target)
                # Tied weights may be one tensor under two names, or two tensors on the same memory.
                memory = (value.data_ptr(), value.stride()) if value.numel() else (spec.target,)
                key = (*memory, value.shape, value.dtype, spec.kind)
                if key not in made:
                    made[key] = _own(spec, value)
                owner, leaf = _owner(self, spec.target, make=True)
                setattr(owner, leaf, made[key])
                self._stored[spec.arg.name] = spec.target
                if keep_zeros and spec.kind is InputKind.PARAMETER and value.ndim > 1 and bool((value == 0).any()):
                    setattr(owner, _mask(leaf), nn.Buffer(made[key].detach() != 0, persistent=False))
        outputs = signature.output_specs
        self._results = [place for place, spec in enumerate(outputs) if spec.kind is OutputKind.USER_OUTPUT]
        self._updates = [(p, str(s.target)) for p, s in enumerate(outputs) if s.kind is OutputKind.BUFFER_MUTATION]
        graph, self._modes, self._counted = _trainable_graph(exported, self._stored)
        self._graph = GraphModule({}, graph)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the arguments of the original forward method; gives what that gives, in the same structure.

        Raises:
            WrongInputs: an argument is missing, unknown, or not of the captured shape.
        """
        exported = self._origin.program.exported
        inputs = self._bind(args, kwargs)
        values: list[Any] = []
        for spec in exported.graph_signature.input_specs:
            if spec.arg.name in self._stored:
                values.append(self._value(self._stored[spec.arg.name]))
            else:
                values.append(spec.arg.value if isinstance(spec.arg, ConstantArgument) else inputs[spec.arg.name])
        device = next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))
        results = self._graph(*values, *(self._mode(mode, device) for mode in self._modes))
        with torch.no_grad():
            for place, target in self._updates:
                self._value(target).copy_(results[place])
            for target in self._counted:
                if _owner(self, target)[0].training:
                    self._value(target).add_(1)
        return pytree.tree_unflatten([results[place] for place in self._results], _out_spec(exported))

    def _mode(self, mode: str | None, device: torch.device) -> Any:
        """What a placeholder behind the program's own gets: the device, or whether a sub-module is being trained."""
        return device if mode is None else self.get_submodule(mode).training

    def _value(self, target: str) -> Tensor:
        owner, leaf = _owner(self, target)
        value = getattr(owner, leaf)
        mask = owner._buffers.get(_mask(leaf))
        return value if mask is None else value * mask

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors by input name. Keywords are the forward method's, or the names of `Program.inputs`."""
        slots = self._origin.slots
        if len(args) > len(slots):
            raise self._wrong(f"got {len(args)} positional arguments, takes {len(slots)}")
        inputs = {spec.name: spec for spec in self._origin.program.inputs}
        given = dict(zip(slots, args, strict=False))
        leaves: dict[str, Any] = {}
        for key, value in kwargs.items():
            if key in given:
                raise self._wrong(f"{key} is given twice")
            if key in slots:
                given[key] = value
            elif key in inputs:
                leaves[key] = value
            else:
                raise self._wrong(f"it has no input {key}")
        for key, value in given.items():
            for name, leaf in self._leaves(slots[key], value).items():
                if name in leaves:
                    raise self._wrong(f"{name} is given twice")
                leaves[name] = leaf
        if missing := [name for name in inputs if name not in leaves]:
            raise self._wrong(f"no tensor for {', '.join(missing)}")
        for name, spec in inputs.items():
            value = leaves[name]
            if not isinstance(value, Tensor):
                raise self._wrong(f"{name} is {type(value).__name__}, not a tensor")
            if tuple(value.shape) != spec.shape:
                raise self._wrong(f"{name} has shape {list(value.shape)}, wants {list(spec.shape)}")
        return leaves

    def _leaves(self, slot: _Slot, value: Any) -> dict[str, Any]:
        try:
            flat = slot.spec.flatten_up_to(value)
        except ValueError as error:
            raise self._wrong(f"{slot.name} has not the structure it was captured with: {error}") from error
        found = {}
        for leaf, item in zip(slot.leaves, flat, strict=True):
            if not isinstance(leaf, ConstantArgument):
                found[leaf] = item
            elif isinstance(item, Tensor) or item != leaf.value:
                raise self._wrong(f"{slot.name} has another value than {leaf.value!r}, which it was captured with")
        return found

    def _wrong(self, what: str) -> WrongInputs:
        program = self._origin.program
        return WrongInputs(model=program.name, what=what, expected=", ".join(map(str, program.inputs)) or "no inputs")


def from_module(module: nn.Module) -> Program:
    """The program that `module` was made from, with the values that the module has now; see `Program.from_module`."""
    started = time.perf_counter()
    found = [child for child in module.modules() if isinstance(child, TrainableModule)]
    if len(found) != 1:
        raise NotFromProgram(module=type(module).__name__, count=len(found) or "none")
    trained = found[0]
    program = trained._origin.program
    exported = copy_exported(program.exported)
    taken: dict[str | int, Tensor] = {}
    changed = 0
    for spec in exported.graph_signature.input_specs:
        if spec.arg.name not in trained._stored:
            continue
        target = str(spec.target)
        old = stored(exported, target)
        new = _checked(program.name, target, trained._value(target).detach(), old)
        if torch.equal(new, old):
            continue  # the tensor itself stays: what is shared stays shared
        changed += 1
        owner, leaf = _owner(trained, target)
        tied = owner._parameters.get(leaf)  # None where a parametrisation computes it
        key = target if tied is None else id(tied)
        if key not in taken:
            value = new.clone(memory_format=torch.contiguous_format)
            taken[key] = nn.Parameter(value, requires_grad=False) if spec.kind is InputKind.PARAMETER else value
        tensors = exported.state_dict if target in exported.state_dict else exported.constants
        tensors[target] = taken[key]
    if not changed:
        return program
    after = program.replace(exported=exported)
    cost = summary(program), summary(after)
    record = Record(
        RECORD,
        changed={"tensor": changed},
        flops_before=cost[0].total.flops,
        flops_after=cost[1].total.flops,
        params_before=cost[0].total.params,
        params_after=cost[1].total.params,
        bytes_before=cost[0].stored_bytes,
        bytes_after=cost[1].stored_bytes,
        seconds=time.perf_counter() - started,
    )
    return after.replace(records=(*program.records, record))


# The tensors ---------------------------------------------------------------------------------------------------------


class _Origin:
    """A module's program, and what its forward method takes. Immutable, so copies of the module share it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.slots = {slot.name: slot for slot in _slots(program.exported)}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Origin:
        return self


def _own(spec: InputSpec, value: Tensor) -> nn.Parameter | nn.Buffer:
    copied = value.detach().clone()
    if spec.kind is InputKind.PARAMETER:
        return nn.Parameter(copied, requires_grad=copied.is_floating_point() or copied.is_complex())
    return nn.Buffer(copied, persistent=spec.kind is InputKind.BUFFER and spec.persistent is not False)


def _owner(root: nn.Module, target: str, *, make: bool = False) -> tuple[nn.Module, str]:
    """The sub-module that has `target`, and its name there."""
    *path, leaf = target.split(".")
    owner = root
    for part in path:
        if make and part not in owner._modules:
            setattr(owner, part, nn.Module())
        child = owner._modules[part]
        assert child is not None, f"{target}: the sub-module {part} was removed"
        owner = child
    return owner, leaf


def _mask(leaf: str) -> str:
    return f"{leaf}_mask"


def _checked(model: str, target: str, new: Tensor, old: Tensor) -> Tensor:
    """`new` as the program stores it: its dtype and device. Raises StateMismatch."""
    floating = new.is_floating_point() and old.is_floating_point()
    if new.shape != old.shape or not (floating or new.dtype == old.dtype):
        have, want = (f"{tensor.dtype}{list(tensor.shape)}".removeprefix("torch.") for tensor in (new, old))
        raise StateMismatch(model=model, tensor=target, got=have, want=want)
    return new.to(device=old.device, dtype=old.dtype)


# The graph -----------------------------------------------------------------------------------------------------------


def _trainable_graph(
    exported: ExportedProgram, targets: Mapping[str, str]
) -> tuple[Graph, tuple[str | None, ...], tuple[str, ...]]:
    """The graph with what training decides as further inputs.

    Returns:
        The graph; for each further input the sub-module whose mode it is, or None for the device; the names of the
        buffers that count batches.
    """
    graph = copy_exported(exported).graph
    modes: dict[str | None, Node] = {}
    last = next(node for node in graph.nodes if node.op != "placeholder")

    def mode(of: str | None) -> Node:
        if of not in modes:
            with graph.inserting_before(last):
                modes[of] = graph.placeholder("device" if of is None else f"training_{len(modes)}")
        return modes[of]

    counted = []
    known = set(targets.values())
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # it pins dtype and device, and the module may be moved
        elif isinstance(node.kwargs.get("device"), torch.device):
            node.update_kwarg("device", mode(None))
        elif node.target in _DROPOUTS and node.args[2] is False:
            node.update_arg(2, mode(""))
        elif (norm := _batch_norm_of(node)) is not None:
            inputs, results = norm
            if (target := targets.get(getattr(inputs[3], "name", ""))) is None:
                continue
            owner = target.rpartition(".")[0]
            with graph.inserting_before(node):
                new = graph.call_function(_batch_norm, (*inputs, mode(owner)))
            for result in results:
                result.replace_all_uses_with(new)
                graph.erase_node(result)
            if node not in results:
                graph.erase_node(node)
            if (count := f"{owner}.num_batches_tracked".lstrip(".")) in known and count not in counted:
                counted.append(count)
    return graph, tuple(modes), tuple(counted)


def _batch_norm_of(node: Node) -> tuple[tuple[Any, ...], list[Node]] | None:
    """(x, weight, bias, mean, var, momentum, eps) of a batch norm with fixed statistics, and the nodes that give its
    result."""
    if node.target is _aten._native_batch_norm_legit_no_training.default:
        users = list(node.users)
        first = [user for user in users if user.args[1:] == (0,)]
        return (tuple(node.args), first) if len(first) == len(users) else None
    if node.target is _aten.batch_norm.default and node.args[5] is False:
        return (*node.args[:5], *node.args[6:8]), [node]
    return None


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    eps: float,
    training: bool,
) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


# Arguments and results -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """One argument of the original forward method: its leaves are input names or constants."""

    name: str
    spec: pytree.TreeSpec
    leaves: tuple[str | ConstantArgument, ...]


def _slots(exported: ExportedProgram) -> Iterator[_Slot]:
    assert exported.call_spec.in_spec is not None
    positional, keyword = exported.call_spec.in_spec.children()
    specs = [*positional.children(), *keyword.children()]
    signature = exported.module_call_graph[0].signature
    names = list(signature.forward_arg_names or ()) if signature is not None else []
    keys = list(keyword.context or ())
    arguments = iter(s.arg for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT)
    for place, spec in enumerate(specs):
        leaves = tuple(
            arg if isinstance(arg, ConstantArgument) else str(arg.name)
            for arg in (next(arguments) for _ in range(spec.num_leaves))
        )
        if place >= positional.num_children:
            name = str(keys[place - positional.num_children])
        elif spec.is_leaf() and isinstance(leaves[0], str):
            name = leaves[0]
        else:
            name = str(names[place]) if len(names) == len(specs) else f"argument {place}"
        yield _Slot(name, spec, leaves)


def _out_spec(exported: ExportedProgram) -> pytree.TreeSpec:
    spec = exported.call_spec.out_spec
    assert spec is not None
    return spec
