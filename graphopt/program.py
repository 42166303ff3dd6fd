"""The program that everything works on: an exported graph with names, example inputs and the history of its passes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph

from graphopt.errors import CannotWrite, WrongInputs
from graphopt.exported import (
    STORED,
    TensorSpec,
    arguments,
    copy_exported,
    dtype_name,
    example_arguments,
    examples_of,
    identifier,
    input_specs,
    listing,
    output_specs,
    stored,
    user_output_places,
)
from graphopt.record import Record
from graphopt.sparsity import Annotation, Format
from graphopt.weights import carried, ordered

# The member of the .pt2 archive that holds what ExportedProgram has no place for.
EXTRA = "graphopt.json"


class Program:
    """An exported program that always runs in PyTorch.

    It is immutable: passes take a `copy()`, change the graph of that, and wrap it with `replace`. Copies share the
    weight tensors, so no tensor of `exported.state_dict` or `exported.constants` may be written to; put another
    tensor in its place. All shapes are static.
    """

    def __init__(
        self,
        exported: ExportedProgram,
        *,
        name: str = "model",
        example_inputs: Mapping[str, Tensor] | None = None,
        records: Sequence[Record] = (),
        annotations: Mapping[str, Annotation] | None = None,
    ) -> None:
        """Wrap `exported`, which must be functional and static; `capture` makes such a one.

        Args:
            exported: the graph; it is not copied, and belongs to this Program from now on.
            name: any text; made safe as an identifier.
            example_inputs: tensors by input name; taken from `exported` where None.
            records: passes that ran so far.
            annotations: what is known of zeros in weights, by the weights' names; it is taken to be true.

        Raises:
            WrongInputs: the example inputs do not fit.
        """
        self._exported = exported
        self._name = identifier(name)
        self._records = tuple(records)
        self._annotations = ordered(annotations or {}, exported)
        self._inputs = tuple(input_specs(exported))
        self._outputs = tuple(output_specs(exported))
        if example_inputs is None:
            self._examples = examples_of(exported)
        else:
            self._examples = self._checked(example_inputs)

    # What it is -----------------------------------------------------------------------------------------------------

    @property
    def exported(self) -> ExportedProgram:
        """The torch.export program underneath. Read it; to change it take `copy()` first."""
        return self._exported

    @property
    def graph(self) -> Graph:
        """The graph underneath, parameters lifted to placeholders. Read it; to change it take `copy()` first."""
        return self._exported.graph

    @property
    def name(self) -> str:
        """The model's name, safe as an identifier and as a file name."""
        return self._name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the user passes, in order, by the names of the forward method's arguments."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What comes back, in order: by key where the model returns a mapping, else output or output_0, output_1."""
        return self._outputs

    @property
    def example_inputs(self) -> dict[str, Tensor] | None:
        """One tensor per input, or None where the model came without."""
        return None if self._examples is None else dict(self._examples)

    @property
    def records(self) -> tuple[Record, ...]:
        """What each pass so far did, in order."""
        return self._records

    @property
    def annotations(self) -> Mapping[str, Annotation]:
        """What code generation may count on of the zeros of weights, by the names that they have in the user's model.

        `graphopt.annotate` says more. Passes and `replace` keep them true: see there.
        """
        return MappingProxyType(self._annotations)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters, buffers and constants that the graph uses, by placeholder name, in graph order."""
        return {
            spec.arg.name: stored(self._exported, spec.target)
            for spec in self._exported.graph_signature.input_specs
            if spec.kind in STORED and spec.target is not None
        }

    @property
    def parameters_bytes(self) -> int:
        """Bytes of the parameters, buffers and constants that the graph uses; tensors that share storage count once."""
        used = {node.name for node in self.graph.nodes if node.op == "placeholder" and node.users}
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for name, tensor in self.tensors.items()
            if name in used
        }
        return sum(storages.values())

    def __str__(self) -> str:
        lines = [f"program {self.name}"]
        lines += [f"  input   {spec}" for spec in self.inputs]
        lines += [f"  output  {spec}" for spec in self.outputs]
        lines += [f"  sparse  {name}: {annotation}" for name, annotation in self._annotations.items()]
        lines += [f"  {line}" for line in listing(self._exported)]
        return "\n".join(lines)

    def __repr__(self) -> str:
        nodes = sum(node.op == "call_function" for node in self.graph.nodes)
        takes, gives = (", ".join(map(str, specs)) for specs in (self.inputs, self.outputs))
        return f"<Program {self.name}: ({takes}) -> ({gives}), {nodes} nodes>"

    # Running it -----------------------------------------------------------------------------------------------------

    def __call__(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run on tensors in the order of `inputs`. One output comes back bare, several as a tuple."""
        if len(tensors) != len(self.inputs):
            raise self._wrong(f"got {len(tensors)} tensors, wants {len(self.inputs)}")
        results = tuple(self.run({spec.name: t for spec, t in zip(self.inputs, tensors, strict=True)}).values())
        return results[0] if len(results) == 1 else results

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on tensors by name, in inference mode. Buffers that the model updates stay as they are.

        Raises:
            WrongInputs: a name, shape or dtype is not as in `inputs`.
        """
        given = self._checked(inputs)
        with torch.inference_mode():
            results = self._exported.graph_module(*arguments(self._exported, given))
        return {
            spec.name: results[place]
            for spec, place in zip(self.outputs, user_output_places(self._exported), strict=True)
        }

    def completed(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs by name: what is given, and the examples of inputs that a pass added since."""
        return {**(self._examples or {}), **given}

    # Making others from it ------------------------------------------------------------------------------------------

    def copy(self) -> Program:
        """The same program with a graph of its own; the weight tensors are shared."""
        exported = copy_exported(self._exported)
        return Program(
            exported,
            name=self.name,
            example_inputs=self._examples,
            records=self.records,
            annotations=self._annotations,
        )

    def replace(
        self,
        *,
        exported: ExportedProgram | None = None,
        name: str | None = None,
        example_inputs: Mapping[str, Tensor] | None = None,
        records: Sequence[Record] | None = None,
        annotations: Mapping[str, Annotation] | None = None,
        formats: Mapping[str, Format | None] | None = None,
    ) -> Program:
        """The same program with what is given put in place. What is not given is shared with this one.

        Annotations stay true: with another `exported`, weights whose values are others now, and only these, are looked
        at again. Those that no longer keep to their format get the one that is found in them, or none.

        Args:
            exported, name, example_inputs, records: as the constructor takes them.
            annotations: as the constructor takes them; instead of this program's.
            formats: the formats of some weights of the new program, by name, None: dense; instead of what they have.
        """
        if annotations is None:
            annotations = self._annotations
            if exported is not None or formats:
                annotations = carried(annotations, formats or {}, self._exported, exported or self._exported)
        return Program(
            self._exported if exported is None else exported,
            name=self.name if name is None else name,
            example_inputs=self._examples if example_inputs is None else example_inputs,
            records=self.records if records is None else records,
            annotations=annotations,
        )

    def to_module(self, *, keep_zeros: bool = False) -> nn.Module:
        """A module to train, with copies of this program's tensors; `from_module` takes it back.

        It takes the arguments of the original forward method, in order or by the names of `inputs`, in the captured
        shapes, and gives what that gives, in the same structure. Its state_dict has the source model's names where
        these still exist; tied weights stay tied. All floating-point parameters are trainable, frozen and folded ones
        too; constants are buffers that the state_dict leaves out. It may be moved to another device or dtype.

        It starts in train() mode, as modules do. There
        * batch norm uses the statistics of the batch and updates the running ones, unless it was folded. The mode
          is that of the sub-module that has them: `module.layer1.bn.eval()` freezes them, as in the source model.
        * dropout is active where the graph still has it. Capture is in eval mode and leaves dropout out, so in
          programs that `capture` made there is none: put it around the module, or regularise otherwise.
        In eval() mode it computes what the program computes. Buffers that the model itself updates are updated in
        both modes, as in the source model.

        Args:
            keep_zeros: elements of parameters of two or more dimensions that are zero stay so: for sparse weights.
        """
        from graphopt.trainable import TrainableModule

        return TrainableModule(self, keep_zeros=keep_zeros)

    @staticmethod
    def from_module(module: nn.Module) -> Program:
        """The program that `module` was made from by `to_module`, with the values that the module has now.

        Graph, example inputs and records are those of that program; where a tensor changed, a record "fine-tune" comes
        behind them, else it is that very program. The values are copied: the module can be trained on. What was moved
        to another device or floating-point dtype is brought back to the program's.

        Args:
            module: what `to_module` gave, or a module around it (compiled, wrapped for several devices, the user's).

        Raises:
            NotFromProgram: there is no such module in it, or more than one.
            StateMismatch: a tensor has another shape or another kind of dtype by now.
        """
        from graphopt.trainable import from_module

        return from_module(module)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .pt2 file that torch.export.load and `capture` read; records and annotations included. Whole or not
        at all.

        Raises:
            CannotWrite: the file system refuses.
        """
        exported = copy_exported(self._exported)
        if self._examples is not None:
            exported.example_inputs = example_arguments(exported, self._examples)
        extra = {
            "name": self.name,
            "records": [record.to_json() for record in self.records],
            # Only the words: the shares follow from the values, and are worked out again.
            "annotations": {name: annotation.word for name, annotation in self._annotations.items()},
        }
        files = {EXTRA: json.dumps(extra, sort_keys=True)}
        write_whole(path, lambda file: torch.export.save(exported, file, extra_files=files))

    def _checked(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known = [spec.name for spec in self.inputs]
        if missing := [name for name in known if name not in inputs]:
            raise self._wrong(f"no tensor for {', '.join(missing)}")
        if unknown := [name for name in inputs if name not in known]:
            raise self._wrong(f"it has no input {', '.join(unknown)}")
        for spec in self.inputs:
            tensor = inputs[spec.name]
            if not isinstance(tensor, Tensor):
                raise self._wrong(f"{spec.name} is {type(tensor).__name__}, not a tensor")
            got = TensorSpec(spec.name, tuple(tensor.shape), dtype_name(tensor.dtype))
            if got != spec:
                raise self._wrong(f"got {got}, wants {spec}")
        return {name: inputs[name].detach() for name in known}

    def _wrong(self, what: str) -> WrongInputs:
        return WrongInputs(model=self.name, what=what, expected=", ".join(map(str, self.inputs)) or "no inputs")


def write_whole(path: str | os.PathLike[str], write: Callable[[Any], None]) -> None:
    """Call `write` with a binary file beside `path`, then rename that to `path`: the file is whole or not there.

    Raises:
        CannotWrite: the file system refuses.
    """
    target = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            write(file.file)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is readable by its owner only; the result shall have the rights of any new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(target)
    except OSError as error:
        raise CannotWrite(file=target, reason=error.strerror or error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
