"""Every operator with a rule: any keep on any of its axes gives what the masked program gives."""

from __future__ import annotations

import pytest
import torch

from graphopt.axes import infer
from graphopt.axes.axes import POINTWISE, operator_of
from graphopt.axes.call import RULES
from graphopt.axes.table import SIGNATURES
from tests.graphopt.axes.operators import CASES
from tests.graphopt.axes.single import Case, Const, T, assert_shrinks, aten, case, program_of

# Of these no two runs agree, or no numbers are defined, so that only shapes can be compared.
RANDOM = {"empty", "new_empty", "empty_like", "rand", "randn", "rand_like", "randn_like", "randint", "randperm",
          "bernoulli", "rrelu", "native_dropout"}  # fmt: skip
# What PyTorch exports in no other precision.
ONLY = {"_grouped_mm": (torch.bfloat16,)}
INTEGERS = ("bitwise", "gcd", "lcm", "__and__", "__or__", "__xor__", "__lshift__", "__rshift__")


def name_of(one: Case) -> str:
    return str(one.op).removeprefix("aten.").removesuffix("." + one.op._overloadname)


def _ids() -> list[str]:
    return [f"{n}-{name_of(one)}" for n, one in enumerate(CASES)]


@pytest.mark.parametrize("one", CASES, ids=_ids())
def test_shrink_equals_mask(one: Case) -> None:
    """Each axis alone and all at once, reordered too, in both precisions; as many axes are free as there should be."""
    for dtype in ONLY.get(name_of(one), (torch.float64, torch.float32)):
        axes = infer(program_of(one, dtype))
        assert not axes.unknown
        assert len(axes.free()) == one.free, "\n".join(axes.listing())
        assert_shrinks(axes.program, axes=axes, alone=dtype is not torch.float32)


def test_every_rule_has_a_case() -> None:
    """Registered means tested; and no operator has two entries."""
    covered = {name_of(one) for one in CASES}
    assert (RULES.keys() | SIGNATURES.keys()) - covered - RANDOM == set()
    assert RULES.keys() & SIGNATURES.keys() == set()


def _pointwise() -> list[str]:
    names = set(POINTWISE)
    for name in dir(aten):
        packet = getattr(aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            if torch.Tag.pointwise in getattr(packet, overload).tags and not name.endswith("_"):
                names.add(name)
    return sorted(names - {"equal"} - RULES.keys() - RANDOM - {name_of(one) for one in CASES})


def _call(name: str) -> Case | None:
    """A call of some overload of a pointwise operator, every tensor with other dimensions of extent 1."""
    shapes = [(3, 4, 5), (4, 1), (3, 1, 5)]
    for overload in getattr(aten, name).overloads():
        op = getattr(getattr(aten, name), overload)
        arguments = op._schema.arguments
        if any(argument.is_out for argument in arguments):
            continue
        left = iter(shapes)
        given = {}
        for argument in arguments:
            kind = str(argument.type)
            if kind == "Tensor" or (name in ("clamp", "clip") and kind == "Optional[Tensor]"):
                shape = next(left)
                given[argument.name] = _tensor(name, argument.name, shape)
            elif name in ("clamp", "clip") and argument.name == "min":
                given[argument.name] = 1 if name.startswith(INTEGERS) else 0.5
            elif argument.has_default_value() or kind.startswith("Optional"):
                continue
            elif kind in ("Scalar", "number", "float"):
                given[argument.name] = 1 if name.startswith(INTEGERS) else 0.5
            elif kind == "int":
                given[argument.name] = 1
            elif kind == "bool":
                given[argument.name] = False
            elif kind == "Device":
                given[argument.name] = torch.device("cpu")
            elif "ScalarType" in kind or kind == "dtype":
                given[argument.name] = torch.float64
        tensors = sum(isinstance(value, (T, Const)) for value in given.values())
        if tensors:
            positional = [given.pop(a.name) for a in arguments if a.name in given and not a.kwarg_only]
            return case(op, 3, *positional, **given)
    return None


def _tensor(name: str, argument: str, shape: tuple[int, ...]) -> T | Const:
    if argument == "mask" or (name == "where" and argument == "condition"):
        return Const((torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5).tolist(), torch.bool)
    if name.startswith(INTEGERS):
        return Const(torch.randint(1, 5, shape, generator=torch.Generator().manual_seed(1)).tolist())
    return T(shape, 1.1 if "acosh" in name or "arccosh" in name or "zeta" in name else 0.1)


@pytest.mark.parametrize("name", _pointwise())
def test_pointwise_equals_mask(name: str) -> None:
    """Operators that PyTorch tags as pointwise, and those that we add to these: tensors are broadcast."""
    one = _call(name)
    assert one is not None
    program = program_of(one)
    assert any(operator_of(node) == name for node in program.graph.nodes if node.op == "call_function")
    axes = infer(program)
    assert not axes.unknown
    assert len(axes.free()) == 3
    assert_shrinks(program, axes=axes, alone=False)
