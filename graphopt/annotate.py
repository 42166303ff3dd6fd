"""The second primitive: say that a weight is sparse, and how. The values stay an ordinary tensor with zeros in it.

The program runs in PyTorch as it did, and costs there what it did; code generation reads `program.annotations`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase

from graphopt.errors import FormatNotKept, NotAWeight, UnknownTensor
from graphopt.exported import STORED, op_name, stored
from graphopt.place import place
from graphopt.program import Program
from graphopt.sparsity import Annotation, Format, fingerprint, parse_annotation
from graphopt.weights import Weight, same_memory, weights

__all__ = ["Annotation", "annotate", "by_fingerprint", "fingerprint"]


def annotate(program: Program, formats: Mapping[str, Format | str | None]) -> Program:
    """The program with annotations of some of its weights; what it computes is unchanged.

        program = graphopt.annotate(program, {"layers.*.weight": "4x1", "head.weight": "dense"})

    Args:
        program: stays as it is.
        formats: by the name that the tensor has in the model's state_dict, or a pattern (`layers.*.weight`, as in
            fnmatch; it stands for the weights that it fits): a format, its word ("unstructured", "4x1", "2:4",
            "8:2:4"), or "dense": code generation shall take it as dense. None removes the annotation; zeros are found
            and annotated again when the program is compiled. Later entries override earlier ones. A format that leaves
            nothing out of a weight is of no use: it is dropped when the weight is next looked at.

    Raises:
        UnknownTensor: there is no such tensor, or no weight that the pattern fits.
        NotAWeight: it is no weight of a linear layer, a matrix product with a stored matrix, or a convolution.
        FormatNotKept: its values do not keep to the format; says where.
        BadOption: there is no such format.
    """
    known = weights(program.exported)
    result = dict(program.annotations)
    for pattern, wanted in formats.items():
        form = parse_annotation(wanted) if isinstance(wanted, str) else wanted
        for weight in _named(program, known, pattern):
            if wanted is None:
                result.pop(weight.name, None)
                continue
            if form is not None and (reason := weight.offence(form)) is not None:
                raise FormatNotKept(tensor=weight.name, format=form, reason=reason, way_out=_way_out(weight))
            result[weight.name] = weight.annotation(form)
    return program.replace(annotations=result)


def by_fingerprint(program: Program) -> dict[str, tuple[str, Annotation]]:
    """Name and annotation by the fingerprint of the values, for kernels that meet a weight as a constant that was
    transposed, reshaped or copied. Of several with the same values, the first.

    A fingerprint does not know how the constant is arranged: a kernel asks `sparsity.conforms` of the matrix it has.
    """
    tensors = {name: stored(program.exported, name) for name in program.annotations}
    found: dict[str, tuple[str, Annotation]] = {}
    for name, annotation in program.annotations.items():
        found.setdefault(fingerprint(tensors[name]), (name, annotation))
    return found


def _named(program: Program, known: Mapping[str, Weight], pattern: str) -> list[Weight]:
    """The weights of a name or pattern. Raises UnknownTensor and NotAWeight."""
    if pattern in known:
        return [known[pattern]]
    signature = program.exported.graph_signature
    names = [str(spec.target) for spec in signature.input_specs if spec.kind in STORED]
    if pattern in names:
        tied = same_memory(known, stored(program.exported, pattern))
        if tied is None:
            raise NotAWeight(tensor=pattern, what=_what(program, pattern))
        return [tied]
    if pattern in {spec.name for spec in program.inputs}:
        raise NotAWeight(tensor=pattern, what="an input of the program")
    if found := [weight for name, weight in known.items() if fnmatchcase(name, pattern)]:
        return found
    if others := [name for name in names if fnmatchcase(name, pattern)]:
        raise NotAWeight(tensor=others[0], what=_what(program, others[0]))
    near = difflib.get_close_matches(pattern, list(known), 1)
    what = "weight" if any(sign in pattern for sign in "*?[") else "tensor"
    raise UnknownTensor(tensor=pattern, what=what, near=f"; did you mean {near[0]}?" if near else "")


def _what(program: Program, name: str) -> str:
    """What a stored tensor that is no weight is, by the first call that reads it."""
    specs = program.exported.graph_signature.input_specs
    argument = next(spec.arg.name for spec in specs if spec.target == name)
    node = next(node for node in program.graph.nodes if node.name == argument)
    if name in program.exported.graph_signature.buffers_to_mutate.values():
        return "a buffer that the program updates"
    call = next((user for user in node.users if user.op == "call_function"), None)
    if call is None:
        return "read by nothing"
    schema = getattr(call.target, "_schema", None)
    places = [place for place, value in enumerate(call.args) if value is node]
    words = [schema.arguments[places[0]].name] if schema is not None and places else []
    words += [key for key, value in call.kwargs.items() if value is node and not words]
    return f"the argument {words[0] if words else ''} of {op_name(call)} in {place(call)}".replace("  ", " ")


def _way_out(weight: Weight) -> str:
    found = weight.found()
    if isinstance(found, Annotation):
        return f"its zeros are {found.word}; say that, or set to zero what the format does not allow"
    return f"set to zero what the format does not allow; as it is, {found or 'it has hardly any zeros'}"
