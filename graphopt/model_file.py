"""Model files: what they are, by their content, and how to load them without running code that they bring along.

Nothing here unpickles more than tensors unless `unsafe_load` is given. A .pt2 archive can bring code in four ways:
pickled weights, constants or sample inputs (torch.export.load falls back to full unpickling for them), expressions for
symbolic shapes (evaluated by sympy), node targets (any attribute of the torch package), and tree specs (they may import
a module). `_check_archive` looks at all of them before torch.export.load sees the file.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from graphopt.errors import (
    CorruptModel,
    GraphoptError,
    ModelNotFound,
    ModelTooLarge,
    NotAModel,
    ScriptedModel,
    UnsafeModel,
    UnsupportedFormat,
)
from graphopt.program import EXTRA
from graphopt.user_code import check_registered, check_unpickled

# torch writes archives without compression. A file that says it unpacks to more than this many times its size was
# made by somebody else, and with no good in mind.
MAX_INFLATION = 8
_INFLATION_FREE_BYTES = 16 * 1024 * 1024

_TREE_SPECS = ("in_spec", "out_spec")
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
# What a node of a saved graph may call: an operator, or arithmetic on sizes.
_TARGET = re.compile(r"torch\.ops\.\w+\.\w+\.\w+|torch\.ops\.higher_order\.\w+|(_operator|math)\.\w+|torch\.sym_\w+")
_FORBIDDEN_TARGETS = ("torch.ops.aten.from_file.", "_operator.attrgetter", "_operator.methodcaller", "_operator.call")
# What the expression of a symbolic size may call; sympy evaluates it as Python.
_SIZE_FUNCTIONS = {
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod", "FloorDiv",
    "CeilDiv", "CleanDiv", "ModularIndexing", "Where", "TruncToInt", "TruncToFloat", "FloorToInt", "CeilToInt",
    "RoundToInt", "RoundDecimal", "ToFloat", "IntTrueDiv", "FloatTrueDiv", "FloatPow", "PowByNatural", "LShift",
    "RShift", "Identity", "IsNonOverlappingAndDenseIndicator", "floor", "ceiling", "Abs", "sqrt", "Eq", "Ne", "Lt",
    "Le", "Gt", "Ge", "And", "Or", "Not", "Unequality", "Equality", "StrictLessThan", "LessThan",
    "StrictGreaterThan", "GreaterThan",
}  # fmt: skip
_SIZE_SYNTAX = (
    ast.Expression, ast.Name, ast.Load, ast.Constant, ast.Call, ast.keyword, ast.BinOp, ast.UnaryOp, ast.BoolOp,
    ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip


class Kind(Enum):
    """What the content of a file says that it is."""

    EXPORTED = "exported program"
    PICKLED = "pickled"  # by torch.save: a state_dict, a module or whatever else


@dataclass(frozen=True)
class Loaded:
    """What was in a file; exactly one of the three is there."""

    exported: ExportedProgram | None = None
    module: nn.Module | None = None
    state_dict: Mapping[str, Tensor] | None = None
    extra: Mapping[str, Any] | None = None  # graphopt's own notes on an exported program


def load(path: str | os.PathLike[str], *, unsafe_load: bool = False) -> Loaded:
    """Load a model file of any kind, by its content; the suffix does not count.

    Args:
        path: a .pt2, .pt or .pth file.
        unsafe_load: unpickle whatever is in it. That runs code which the file brings along.

    Raises:
        ModelNotFound: it is missing or unreadable.
        NotAModel, CorruptModel, ModelTooLarge: it is no model, or a damaged or an impossibly large one.
        UnsafeModel: loading it would run code, and `unsafe_load` is not given.
        UnregisteredClass, ModuleMissing, ClassMissing: it needs a class that is not to be had here.
        ScriptedModel, UnsupportedFormat: a known format that is not taken; the hint says the way out.
    """
    file = Path(path)
    kind = sniff(file)
    if zipfile.is_zipfile(file):
        _check_sums(file)
    if kind is Kind.EXPORTED:
        return _load_exported(file, unsafe_load)
    return _load_pickled(file, unsafe_load)


def memory_bytes() -> int:
    """The memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def sniff(file: Path) -> Kind:
    """Say what a file is from its first bytes and the names of its members. Raises as `load` does."""
    if file.is_dir():
        raise NotAModel(file=file, what="is a directory")
    try:
        if not file.is_file():
            file.stat()  # raises where there is nothing
            # A named pipe would be waited for, and a device has no end.
            raise NotAModel(file=file, what="is a pipe, a socket or a device, not a file")
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise ModelNotFound(file=file, reason=error.strerror or error) from error
    if size == 0:
        raise NotAModel(file=file, what="is empty")
    if size > memory_bytes():
        raise ModelTooLarge(file=file, what=f"has {size:,} bytes; this machine has {memory_bytes():,} bytes of memory")
    if head.startswith(b"PK\x03\x04"):
        return _sniff_archive(file, size)
    if head.startswith(_LEGACY_MAGIC):
        return Kind.PICKLED
    if _looks_like_onnx(file, head):
        raise UnsupportedFormat(
            file=file, format="ONNX", way_out="export the PyTorch module that it came from with torch.export.save"
        )
    if head[8:9] == b"{" and b'"dtype"' in head:
        raise UnsupportedFormat(
            file=file,
            format="safetensors",
            way_out="it holds weights without a program: load them into the module, then use torch.export.save",
        )
    if file.suffix in (".pt2", ".pt", ".pth"):
        raise CorruptModel(file=file, kind=f"{file.suffix} file", reason="it does not begin as a PyTorch file does")
    raise NotAModel(file=file, what="is not a model: its first bytes are those of no known format")


def _looks_like_onnx(file: Path, head: bytes) -> bool:
    # A protobuf without magic: field 1 (ir_version) comes first, then the producer's name.
    return file.suffix == ".onnx" or (head.startswith(b"\x08") and any(w in head for w in (b"pytorch", b"onnx")))


def _sniff_archive(file: Path, size: int) -> Kind:
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CorruptModel(file=file, kind="archive", reason=error) from error
    declared = sum(member.file_size for member in members)
    if declared > max(MAX_INFLATION * size, _INFLATION_FREE_BYTES) or declared > memory_bytes():
        raise ModelTooLarge(file=file, what=f"{size:,} bytes that say they unpack to {declared:,}")
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        raise CorruptModel(file=file, kind="archive", reason="two members have the same name")
    inner = {name.partition("/")[2] for name in names}
    if any(name.startswith("models/") for name in inner):
        return Kind.EXPORTED
    if "serialized_exported_program.json" in names:
        raise UnsupportedFormat(
            file=file,
            format="the .pt2 format of torch 2.7 and older",
            way_out="load it with that torch, and write it again with torch.export.save of torch 2.8 or newer",
        )
    if any(name.startswith("data/aotinductor/") for name in inner):
        raise UnsupportedFormat(
            file=file, format="an AOTInductor package", way_out="give the program itself: torch.export.save"
        )
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise ScriptedModel(file=file)
    if "data.pkl" in inner:
        return Kind.PICKLED
    raise NotAModel(file=file, what="is a zip file, and holds no model")


def _check_sums(file: Path) -> None:
    """The loaders take weights as they lie in the archive, so a flipped bit would go unnoticed."""
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except Exception as error:  # zipfile raises BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError
        raise CorruptModel(file=file, kind="archive", reason=_first_line(error)) from error
    if broken is not None:
        raise CorruptModel(file=file, kind="archive", reason=f"the checksum of {broken} is wrong")


# Pickled things ------------------------------------------------------------------------------------------------------


def _load_pickled(file: Path, unsafe_load: bool) -> Loaded:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The same exception stands for "an object that is no tensor" and for garbage; only the first names a global.
        if not re.search(r"Unsupported (global|class|operand)|WeightsUnpickler error|GLOBAL", str(error)):
            raise CorruptModel(file=file, kind="PyTorch file", reason=_first_line(error)) from error
        if not unsafe_load:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f"a pickled {found[1]}" if found else "a pickled object"
            raise UnsafeModel(file=file, what=f"{what}, not only tensors, and unpickling runs code") from error
        content = _unpickle(file)
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, ValueError... on damaged files
        raise CorruptModel(file=file, kind="PyTorch file", reason=_first_line(error)) from error
    if isinstance(content, nn.Module):
        return Loaded(module=content)
    weights = _state_dict_in(content)
    if weights is None:
        raise NotAModel(file=file, what=f"holds a {type(content).__name__}, neither a module nor a state_dict")
    return Loaded(state_dict=weights)


def _unpickle(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling runs foreign code: anything may come out
        check_unpickled(file, error)
        raise CorruptModel(file=file, kind="pickled object", reason=_first_line(error)) from error


def _state_dict_in(content: Any) -> Mapping[str, Tensor] | None:
    """The state_dict in a checkpoint: the mapping itself, or what stands under one of the usual keys."""
    if not isinstance(content, Mapping):
        return None
    for key in _STATE_DICT_KEYS:
        if isinstance(content.get(key), Mapping):
            return _state_dict_in(content[key])
    if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        return content
    return None


# Exported programs ---------------------------------------------------------------------------------------------------


def _load_exported(file: Path, unsafe_load: bool) -> Loaded:
    extra: dict[str, Any] = {EXTRA: ""}
    try:
        with file.open("rb") as stream:
            if not unsafe_load:
                _check_archive(file, stream)
                stream.seek(0)
            with _quiet_torch():
                exported = torch.export.load(stream, extra_files=extra)
        notes = json.loads(extra[EXTRA]) if extra[EXTRA] else {}
    except GraphoptError:
        raise
    except Exception as error:  # the loader has no error class of its own: assertions, KeyError, RuntimeError, ...
        check_registered(file, _tree_specs(file))
        raise CorruptModel(file=file, kind="exported program", reason=_first_line(error)) from error
    if not unsafe_load:
        _check_targets(file, exported)
    return Loaded(exported=exported, extra=notes)


def _tree_specs(file: Path) -> list[str]:
    """How inputs and outputs of the saved programs are nested, as text; none where the archive cannot be read."""
    try:
        reader = torch._C.PyTorchFileReader(str(file))
        models = [json.loads(reader.get_record(n)) for n in reader.get_all_records() if n.startswith("models/")]
    except (RuntimeError, ValueError, RecursionError):
        return []
    return [value for model in models for key, value in _walk(model) if key in _TREE_SPECS and isinstance(value, str)]


def _check_archive(file: Path, stream: IO[bytes]) -> None:
    """Refuse an archive that torch.export.load would take code from. The reader is the loader's own, so both see the
    same bytes under the same names."""
    reader = torch._C.PyTorchFileReader(stream)
    names = reader.get_all_records()
    for name in names:
        if name.startswith("data/") and not name.endswith(".json"):
            if _is_raw(reader, name, names):
                continue
            _check_pickle(file, name, reader.get_record(name))
    for name in names:
        if name.startswith("models/"):
            _check_model(file, json.loads(reader.get_record(name)))


def _is_raw(reader: Any, name: str, names: list[str]) -> bool:
    """Whether the loader takes a member as the plain bytes of a tensor, by the config of its folder."""
    folder = name.rpartition("/")[0]
    for config in names:
        if config.startswith(f"{folder}/") and config.endswith("_config.json"):
            entries = json.loads(reader.get_record(config))["config"].values()
            uses = [entry["use_pickle"] for entry in entries if f"{folder}/{entry['path_name']}" == name]
            if uses and not any(uses):
                # A pickled entry of any config that names this member makes it pickled; objects always are.
                return not re.match(r"(custom|opaque)_obj", name.rpartition("/")[2])
    return False


def _check_pickle(file: Path, name: str, content: bytes) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever goes wrong here, torch.export.load would next unpickle it in full
        raise UnsafeModel(file=file, what=f"a pickled object in {name}, not only tensors") from error


def _check_model(file: Path, model: Any) -> None:
    for key, value in _walk(model):
        if key == "expr_str" and not _is_size(str(value)):
            raise UnsafeModel(file=file, what=f"a symbolic size that is no arithmetic: {str(value)[:60]!r}")
        if key == "target" and isinstance(value, str) and re.match(r"torch\.|_operator\.|math\.|#", value):
            known = _TARGET.fullmatch(value) and not value.startswith(_FORBIDDEN_TARGETS)
            if not known:
                raise UnsafeModel(file=file, what=f"a call of {value}, which is no operator")
        if isinstance(value, str) and "default_factory_module" in value:
            raise UnsafeModel(file=file, what="a defaultdict, whose factory would be imported")


def _is_size(text: str) -> bool:
    """Whether an expression is nothing but arithmetic on sizes: known functions, names, numbers, names of symbols."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _SIZE_SYNTAX):
            return False
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _SIZE_FUNCTIONS):
            return False
        if isinstance(node, ast.Name) and "__" in node.id:
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not re.fullmatch(r"[a-z]\d+", node.value):
            return False
    return True


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """All (key, value) pairs of nested JSON; an own stack, so that deep nesting cannot exhaust Python's."""
    stack = [("", value)]
    while stack:
        key, item = stack.pop()
        yield key, item
        if isinstance(item, dict):
            stack.extend(item.items())
        elif isinstance(item, list):
            stack.extend((key, child) for child in item)


def _check_targets(file: Path, exported: ExportedProgram) -> None:
    """What the loader made of the targets must be operators: the check by name must not be the only one."""
    for module in exported.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if node.op != "call_function":
                continue
            operator = isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator))
            home = getattr(node.target, "__module__", "") or ""
            if not operator and home not in ("_operator", "math", "torch"):
                raise UnsafeModel(file=file, what=f"a call of {node.target!r}, which is no operator")


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """The loader logs a traceback before it raises; one clear error is enough."""
    loggers = [logging.getLogger("torch.export"), logging.getLogger("torch.export.pt2_archive._package")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, value in zip(loggers, before, strict=True):
            logger.disabled = value


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
