"""From what the user has, a module or a file, to a Program: functional, static, high-level ATen operators."""

from __future__ import annotations

import inspect
import logging
import operator
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import Node
from torch.utils import _pytree as pytree

from graphopt import model_file
from graphopt.errors import (
    BadInputShape,
    BadOption,
    CaptureFailed,
    CorruptModel,
    InputsNeeded,
    NotAModel,
    StateDictMismatch,
    StateDictNeedsModel,
)
from graphopt.exported import decomposed, keys_of
from graphopt.program import Program
from graphopt.record import Record
from graphopt.sparsity import parse_annotation
from graphopt.spec import TensorSpec, dtype_name
from graphopt.user_code import build
from graphopt.weights import detected, read_back

log = logging.getLogger(__name__)

Examples = Tensor | Sequence[Any] | Mapping[str, Any]
Shapes = Mapping[str, Sequence[int] | TensorSpec]

_SHAPE = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<dims>\d+(x\d+)*)?(:(?P<dtype>\w+))?", re.ASCII)
_MAX_DIGITS = 18  # below 2**63
_KEPT_META = ("val", "nn_module_stack", "stack_trace", "custom")
_SEED = 0


def capture(
    model: nn.Module | ExportedProgram | str | os.PathLike[str],
    example_inputs: Examples | None = None,
    *,
    input_shapes: Shapes | None = None,
    model_factory: str | None = None,
    unsafe_load: bool = False,
    name: str | None = None,
) -> Program:
    """Capture a model.

    Args:
        model: a module (captured in eval mode; its own mode and weights are left as they are), an exported program, or
            the path of a .pt2 file, or of a .pt/.pth file that holds an exported program, a state_dict or a module.
        example_inputs: a tensor, the positional arguments, or the keyword arguments by name.
        input_shapes: shapes by input name, or TensorSpecs where the dtype is not float32. Seeded example inputs are
            made from them. They also say which sizes dynamic dimensions get.
        model_factory: "package.module:function", which builds the module that a state_dict belongs to.
        unsafe_load: unpickle a module from a file. That runs code which the file brings along.
        name: the program's name; by default the file's stem or the module's class.

    Returns:
        A Program with static shapes. A dynamic dimension is specialised to its example size, with a logged warning.
        Weights that have zeros already, as those of a model that was pruned elsewhere, are annotated with their format.

    Raises:
        GraphoptError: one of the classes that `model_file.load` names, or BadInputShape, InputsNeeded, CaptureFailed,
            StateDictNeedsModel, StateDictMismatch, BadModelFactory, ModuleMissing, WrongInputs.
    """
    shapes = {key: _as_spec(key, value) for key, value in (input_shapes or {}).items()}
    if isinstance(model, ExportedProgram):
        return _from_exported(model, example_inputs, shapes, name or "model", {}, "the exported program")
    if isinstance(model, nn.Module):
        return _from_module(model, example_inputs, shapes, name or type(model).__name__)
    if not os.fspath(model):
        raise NotAModel(file="''", what="the path of the model is empty")
    file = Path(model)
    found = model_file.load(file, unsafe_load=unsafe_load)
    name = name or str((found.extra or {}).get("name") or file.stem)
    if found.exported is not None:
        return _from_exported(found.exported, example_inputs, shapes, name, found.extra or {}, str(file))
    if found.module is not None:
        return _from_module(found.module, example_inputs, shapes, name, own_weights=True)
    if model_factory is None:
        raise StateDictNeedsModel(file=file)
    assert found.state_dict is not None
    module = build(model_factory)
    _fill(module, found.state_dict, file, model_factory)
    return _from_module(module, example_inputs, shapes, name, own_weights=True)


def parse_input_shape(text: str) -> TensorSpec:
    """`x=1x3x224x224` or `ids=1x128:int64`, as --input-shape takes it; `x=` is a scalar. Raises BadInputShape."""
    match = _SHAPE.fullmatch(text.strip())
    if match is None:
        raise BadInputShape(what=f"{text!r} is not of the form name=AxBxC")
    sizes = [size for size in (match["dims"] or "").split("x") if size]
    if long := [size for size in sizes if len(size) > _MAX_DIGITS]:
        raise BadInputShape(what=f"{match['name']}: a size of {len(long[0])} digits is more than any machine can hold")
    dims = tuple(map(int, sizes))
    return _as_spec(match["name"], TensorSpec(match["name"], dims, match["dtype"] or "float32"))


def _as_spec(name: str, shape: Sequence[int] | TensorSpec) -> TensorSpec:
    spec = shape if isinstance(shape, TensorSpec) else TensorSpec(name, tuple(shape), "float32")
    if not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
        raise BadInputShape(what=f"{name}: there is no dtype {spec.dtype}")
    if any(not isinstance(size, int) or size < 1 for size in spec.shape):
        raise BadInputShape(what=f"{name}: every size must be a positive whole number, got {list(spec.shape)}")
    if spec.nbytes > (memory_bytes := model_file.memory_bytes()):
        size = "x".join(map(str, spec.shape))
        what = f"{name}: {size} {spec.dtype} takes {spec.nbytes:,} bytes; this machine has {memory_bytes:,} of memory"
        raise BadInputShape(what=what)
    return spec


def seeded(spec: TensorSpec, *, below: int = 2, seed: int = _SEED) -> Tensor:
    """A tensor like `spec`: normally distributed where it is floating, else integers in [0, below)."""
    generator = torch.Generator().manual_seed(seed)
    dtype = spec.torch_dtype
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(spec.shape, generator=generator).to(dtype)
    return torch.randint(0, below, spec.shape, generator=generator).to(dtype)


# Modules -------------------------------------------------------------------------------------------------------------


def _from_module(
    module: nn.Module,
    example_inputs: Examples | None,
    shapes: Mapping[str, TensorSpec],
    name: str,
    own_weights: bool = False,
) -> Program:
    made = example_inputs is None
    args, kwargs = _bind_shapes(module, shapes, name) if made else _as_arguments(example_inputs)
    with _eval_mode(module):
        exported = _export(module, args, kwargs, name)
    if not own_weights:  # the module may be trained on; the program must not change with it
        _clone_weights(exported)
    exported = _canonical(exported, name)
    program = Program(exported, name=name, annotations=detected(exported))
    return program.replace(example_inputs=_seeded_examples(program)) if made else program


def _as_arguments(examples: Examples | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(examples, Mapping):
        return (), dict(examples)
    return ((examples,) if isinstance(examples, Tensor) else tuple(examples or ())), {}


def _bind_shapes(
    module: nn.Module, shapes: Mapping[str, TensorSpec], name: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example arguments for the forward method, in its order, from shapes by name."""
    parameters = inspect.signature(module.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [key for key in known if parameters[key].default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in shapes]:
        raise InputsNeeded(model=name, names=", ".join(missing))
    if not shapes:
        raise InputsNeeded(model=name, names=", ".join(known) or "forward takes *args")
    if unknown := [key for key in shapes if key not in known and not open_ended]:
        raise BadInputShape(what=f"{name} has no input {', '.join(unknown)}; it has {', '.join(known)}")
    order = [key for key in known if key in shapes] + [key for key in shapes if key not in known]
    return (), {key: seeded(shapes[key]) for key in order}


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> ExportedProgram:
    try:
        # Without gradients no_grad() blocks in the model leave no trace; they would become sub-graphs of their own.
        with torch.no_grad(), _torch_silent(), warnings.catch_warnings():
            # An nn.LSTM keeps its weights in a list as well, which it sets again when it is called; nothing is lost.
            weights = r"self\.([\w.]+\.)?_flat_weights\[\d+\]"
            warnings.filterwarnings(
                "ignore", rf"The tensor attributes? ({weights}(, )?)+ (was|were) assigned", UserWarning
            )
            return torch.export.export(module, args, kwargs, strict=False)
    except Exception as error:  # torch.export lets through whatever the model's own code raises
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CaptureFailed(model=name, reason=f"{type(error).__name__}: {reason[:300]}") from error


@contextmanager
def _torch_silent() -> Iterator[None]:
    """Keep torch from logging the traceback of an error that it raises as well, unless somebody looks for one."""
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith("torch")]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    if "TORCH_LOGS" in os.environ or log.isEnabledFor(logging.DEBUG):
        handlers = []

    def none(_: logging.LogRecord) -> bool:
        return False

    for handler in handlers:
        handler.addFilter(none)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(none)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    before = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in before.items():
            child.training = mode


def _clone_weights(exported: ExportedProgram) -> None:
    copies: dict[tuple[Any, ...], Tensor] = {}
    for target, tensor in exported.state_dict.items():
        # Tied weights stay tied: they are one tensor under two names.
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, isinstance(tensor, nn.Parameter))
        if key not in copies or not tensor.numel():
            clone = tensor.detach().clone()
            copies[key] = nn.Parameter(clone, requires_grad=False) if isinstance(tensor, nn.Parameter) else clone
        exported.state_dict[target] = copies[key]


# Exported programs ---------------------------------------------------------------------------------------------------


def _from_exported(
    exported: ExportedProgram,
    example_inputs: Examples | None,
    shapes: Mapping[str, TensorSpec],
    name: str,
    extra: Mapping[str, Any],
    origin: str,
) -> Program:
    try:
        formats = {str(key): parse_annotation(word) for key, word in extra.get("annotations", {}).items()}
        records = tuple(Record.from_json(item) for item in extra.get("records", ()))
    except (TypeError, KeyError, AttributeError, BadOption) as error:
        raise CorruptModel(file=origin, kind="list of passes or annotations", reason=error.args[0]) from error
    if dynamic := _dynamic_dims(exported):
        exported = _specialise(exported, example_inputs, shapes, dynamic, name)
    exported = _canonical(exported, name)
    annotations = read_back(formats, exported)
    program = Program(exported, name=name, records=records, annotations=annotations)
    for spec in program.inputs:
        wanted = shapes.get(spec.name, spec)
        if wanted != spec:
            raise BadInputShape(what=f"{origin}: input {spec} is fixed, and --input-shape says {wanted}")
    if unknown := [key for key in shapes if key not in {spec.name for spec in program.inputs}]:
        known = ", ".join(spec.name for spec in program.inputs)
        raise BadInputShape(what=f"{origin}: has no input {', '.join(unknown)}; it has {known}")
    if example_inputs is not None and not dynamic:
        return program.replace(example_inputs=_by_name(program, example_inputs))
    if program.example_inputs is None or shapes:
        return program.replace(example_inputs=_seeded_examples(program))
    return program


def _by_name(program: Program, examples: Examples) -> dict[str, Tensor]:
    args, kwargs = _as_arguments(examples)
    return dict(zip((spec.name for spec in program.inputs), args, strict=False)) | kwargs


def _dynamic_dims(exported: ExportedProgram) -> dict[str, list[int | None]]:
    """The user inputs with symbolic sizes: by name, the size that each dimension has in the example, None if none."""
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    found: dict[str, list[int | None]] = {}
    for spec in exported.graph_signature.input_specs:
        value = values.get(spec.arg.name) if isinstance(spec.arg, TensorArgument) else None
        if spec.kind is InputKind.USER_INPUT and isinstance(value, Tensor):
            sizes: list[int | None] = [
                size.node.hint if isinstance(size, torch.SymInt) else int(size) for size in value.shape
            ]
            if any(isinstance(size, torch.SymInt) for size in value.shape):
                found[spec.arg.name] = sizes
    return found


def _specialise(
    exported: ExportedProgram,
    example_inputs: Examples | None,
    shapes: Mapping[str, TensorSpec],
    dynamic: Mapping[str, list[int | None]],
    name: str,
) -> ExportedProgram:
    """Export again with the sizes of the example inputs, or with those asked for."""
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    names = [s.arg.name for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    if example_inputs is not None:
        args, kwargs = _as_arguments(example_inputs)
    elif exported.example_inputs is not None:
        args, kwargs = exported.example_inputs
    else:
        args, kwargs = (), {}
        sized = {key: sizes for key, sizes in dynamic.items() if key not in shapes}
        if missing := [key for key, sizes in sized.items() if None in sizes]:
            raise InputsNeeded(model=name, names=", ".join(missing))
    if example_inputs is None:
        flat = pytree.tree_leaves((args, kwargs)) or [None] * len(names)
        for place, key in enumerate(names):
            dtype = dtype_name(values[key].dtype) if isinstance(values[key], Tensor) else ""
            if key in shapes:
                flat[place] = seeded(TensorSpec(key, shapes[key].shape, dtype))
            elif flat[place] is None and dtype:
                known = dynamic.get(key) or list(values[key].shape)
                flat[place] = seeded(TensorSpec(key, tuple(int(size or 1) for size in known), dtype))
        args, kwargs = pytree.tree_unflatten(flat, exported.call_spec.in_spec)
    result = _export(exported.module(check_guards=False), args, kwargs, name)
    fixed = {n.name: n.meta["val"].shape for n in result.graph.nodes if n.op == "placeholder" and n.name in dynamic}
    chosen = ", ".join(f"{key}={'x'.join(map(str, shape))}" for key, shape in fixed.items())
    log.warning("%s: dynamic sizes are fixed to %s; choose others with --input-shape", name, chosen)
    return result


def _canonical(exported: ExportedProgram, name: str) -> ExportedProgram:
    """Functional, without sub-graphs, with plain containers and only the metadata that is read."""
    if not _is_functional(exported):
        try:
            # An empty table: nothing is decomposed, but updates in place become values and sub-graphs are inlined.
            exported = decomposed(exported, {})
        except Exception as error:  # as for _export
            raise CaptureFailed(model=name, reason=f"{type(error).__name__}: {str(error)[:300]}") from error
    for node in reversed(exported.graph.nodes):
        # torch.export.load makes one for each result of a split, used or not.
        if node.target is operator.getitem and not node.users:
            exported.graph.erase_node(node)
            continue
        node.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
    exported.graph_module.recompile()
    signature = exported.module_call_graph[0].signature
    assert signature is not None
    signature.out_spec = _plain(signature.out_spec)
    return exported


def _is_functional(exported: ExportedProgram) -> bool:
    if exported.dialect != "ATEN":
        return False
    calls = [node.target for node in exported.graph.nodes if node.op in ("call_function", "get_attr")]
    return all(not isinstance(t, str) and not (hasattr(t, "_schema") and t._schema.is_mutable) for t in calls)


def _plain(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """Dicts, tuples and lists in place of the model's own classes, so that the file can be read without these."""
    if spec.is_leaf():
        return spec
    children = [_plain(child) for child in spec.children()]
    if keys := keys_of(spec):
        return pytree.TreeSpec(dict, keys, children)
    return pytree.TreeSpec(spec.type if spec.type in (list, tuple) else tuple, None, children)


# Example inputs and state_dicts --------------------------------------------------------------------------------------


def _seeded_examples(program: Program) -> dict[str, Tensor]:
    """Example inputs for a program without: integers stay below the rows of the tables that they look up."""
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    examples = {}
    for place, spec in enumerate(program.inputs):
        rows = _rows_looked_up(placeholders[spec.name])
        if rows is None and not spec.torch_dtype.is_floating_point:
            examples[spec.name] = torch.ones(spec.shape, dtype=spec.torch_dtype)  # a mask that hides nothing
        else:
            examples[spec.name] = seeded(spec, below=rows or 2, seed=_SEED + place)
    return examples


def _rows_looked_up(node: Node) -> int | None:
    rows = []
    for user in node.users:
        if str(user.target) == "aten.embedding.default" and user.args[1] is node:
            rows.append(int(user.args[0].meta["val"].shape[0]))  # type: ignore[union-attr]
        elif len(user.all_input_nodes) == 1 and isinstance(user.meta.get("val"), Tensor):
            rows.append(_rows_looked_up(user) or 0)
    rows = [count for count in rows if count]
    return min(rows) if rows else None


def _fill(module: nn.Module, weights: Mapping[str, Tensor], file: Path, factory: str) -> None:
    try:
        found = module.load_state_dict(dict(weights), strict=False)
    except RuntimeError as error:  # sizes that differ; torch names them line by line
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise StateDictMismatch(file=file, factory=factory, reason=reason) from error
    reasons = [
        f"{word} {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
        for word, keys in (("missing", found.missing_keys), ("unexpected", found.unexpected_keys))
        if keys
    ]
    if reasons:
        raise StateDictMismatch(file=file, factory=factory, reason="; ".join(reasons))
