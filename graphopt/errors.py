"""Every error a user can meet: one class each, with a stable code, an exit code and the way out.

Three kinds of "no" are never mixed: a `GraphoptError` is the user's to mend and ends the run; a `Decline` means that a
rule did not apply, and the run goes on; an `assert` is ours.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar


class Exit(IntEnum):
    """Exit codes of the command line, stable across versions."""

    DONE = 0
    CHECK_FAILED = 1
    BAD_INPUT = 2
    UNAVAILABLE = 3
    IO_FAILED = 5
    INTERNAL = 70


@dataclass(frozen=True)
class Decline:
    """A rule looked and did not apply."""

    where: str
    reason: str


class GraphoptError(Exception):
    """Base of all user errors. `message` and `hint` are templates over the keyword arguments given."""

    code: ClassVar[str]
    message: ClassVar[str]
    hint: ClassVar[str] = ""
    exit: ClassVar[Exit] = Exit.BAD_INPUT

    def __init__(self, **fields: object) -> None:
        self.fields = fields
        super().__init__(self.message.format(**fields))

    @property
    def way_out(self) -> str:
        """The hint with its fields filled in; empty where there is none."""
        missing = {name for _, name, _, _ in string.Formatter().parse(self.hint) if name} - self.fields.keys()
        assert not missing, f"{type(self).__name__} was raised without {sorted(missing)}"
        return self.hint.format(**self.fields)

    def __str__(self) -> str:
        return f"error[{self.code}]: {self.args[0]}" + (f"\n  hint: {self.way_out}" if self.hint else "")


class UnknownTarget(GraphoptError):
    """The name of a target or of its processor is not known."""

    code = "unknown-target"
    message = "{target}: no such target{near}"
    hint = "`graphopt targets` lists what can be built and run here"


class ToolMissing(GraphoptError):
    """A tool that the target needs to build or to run is not installed."""

    code = "tool-missing"
    message = "{tool} is needed to {purpose}, and was not found"
    hint = "{install}"
    exit = Exit.UNAVAILABLE


class LinkFailed(GraphoptError):
    """The compiler or the linker refused what code generation made; `reason` has the first lines of what it said."""

    code = "link-failed"
    message = "{name}: could not be linked for {target}: {reason}"
    hint = "this is a fault of graphopt or of its toolchain; report it with what --dump-dir wrote"
    exit = Exit.INTERNAL


class RunFailed(GraphoptError):
    """A compiled model could not be loaded or did not run to its end."""

    code = "run-failed"
    message = "{name}: did not run with {runner}: {reason}"
    hint = "check that the files are those that graphopt wrote for this machine; if they are, report it"
    exit = Exit.CHECK_FAILED


class UnsupportedOp(GraphoptError):
    """An operator that neither our templates nor TVM can express."""

    code = "unsupported-op"
    message = "{op} at {where} is not supported: {reason}"
    hint = (
        "rewrite that place of the model with other operators; `graphopt inspect` lists every operator with its place"
    )


class ModelNotFound(GraphoptError):
    """The model file is missing or may not be read. Exit 5: the path may be right and the file system at fault."""

    code = "model-not-found"
    message = "{file}: cannot be read: {reason}"
    hint = "give the path of a .pt2 file written by torch.export.save, or of a .pt file"
    exit = Exit.IO_FAILED


class NotAModel(GraphoptError):
    """The file can be read and is not a model that capture knows: a directory, an empty file, a picture, ..."""

    code = "not-a-model"
    message = "{file}: {what}"
    hint = "graphopt takes .pt2 (torch.export.save), and .pt/.pth holding an exported program or a state_dict"


class CorruptModel(GraphoptError):
    """The file claims to be a model and is truncated, damaged or inconsistent."""

    code = "corrupt-model"
    message = "{file}: damaged or truncated {kind}: {reason}"
    hint = "copy or export the file again, and compare its size with the original's"


class ModelTooLarge(GraphoptError):
    """The file, or what it says it unpacks to, is larger than is sane or than this machine's memory."""

    code = "model-too-large"
    message = "{file}: {what}"
    hint = "a model must fit in this machine's memory; a small file that unpacks to a huge one is refused as hostile"


class UnsafeModel(GraphoptError):
    """Loading the file would run whatever code the file's author put there: unpickling objects does."""

    code = "unsafe-model"
    message = "{file}: holds {what}; loading it could run code that the file brings along"
    hint = "export it to .pt2 with torch.export.save, or, if you trust its author, pass --unsafe-load"


class ScriptedModel(GraphoptError):
    """A TorchScript archive: a different program format, without a graph that torch.export could take."""

    code = "torchscript-model"
    message = "{file}: is TorchScript, which graphopt does not take"
    hint = (
        "in the Python code that makes the model: torch.export.save(torch.export.export(model.eval(), inputs), "
        '"model.pt2")'
    )


class UnsupportedFormat(GraphoptError):
    """A known model format that is not supported (yet)."""

    code = "unsupported-format"
    message = "{file}: {format} is not yet supported"
    hint = "{way_out}"


class StateDictNeedsModel(GraphoptError):
    """A bare state_dict has weights and no program."""

    code = "state-dict-needs-model"
    message = "{file}: holds a state_dict: weights without a program"
    hint = "name a function that builds the module: --model package.module:factory"


class StateDictMismatch(GraphoptError):
    """The weights in the file are not those of the module that the factory builds."""

    code = "state-dict-mismatch"
    message = "{file}: does not fit {factory}: {reason}"
    hint = "the factory must build the very module that the weights were saved from"


class BadModelFactory(GraphoptError):
    """--model names no function that builds an nn.Module."""

    code = "bad-model-factory"
    message = "--model {factory}: {reason}"
    hint = "write package.module:function; the function is called without arguments and returns an nn.Module"


class ModuleMissing(GraphoptError):
    """A Python module that --model, --import or a pickled object names, or one that it imports, is not to be found."""

    code = "module-not-found"
    message = "{what}: there is no Python module {module}"
    hint = (
        "modules are looked for in the working directory, in the folders that the variable PYTHONPATH names, and among "
        "the packages installed beside graphopt"
    )


class ImportFailed(GraphoptError):
    """A module that --import names raised an exception."""

    code = "import-failed"
    message = "--import {module}: {reason}"
    hint = "`python -c 'import {module}'` shows the whole story"


class ClassMissing(GraphoptError):
    """A pickled object's class is not in the module that the file says."""

    code = "class-not-found"
    message = "{file}: holds an object of the class {name}, and the module {module} has none"
    hint = "save it from a program that imports {name} from a module of its own, which is then to be found here as well"


class UnregisteredClass(GraphoptError):
    """An exported program takes or gives a class that PyTorch has to be told of, such as transformers.ModelOutput."""

    code = "unregistered-class"
    message = "{file}: the model takes or gives {name}, a class that PyTorch does not know here"
    hint = "{way_out}"


class BadInputShape(GraphoptError):
    """An --input-shape that cannot be read, or that does not fit the model."""

    code = "bad-input-shape"
    message = "{what}"
    hint = "write name=1x3x224x224, or name=1x128:int64 where it is not float32"


class InputsNeeded(GraphoptError):
    """Nothing says what the inputs of the model look like."""

    code = "inputs-needed"
    message = "{model}: has no example inputs, so their shapes are not known: {names}"
    hint = "give one --input-shape NAME=1x3x224x224 for each"


class CaptureFailed(GraphoptError):
    """torch.export refused the module."""

    code = "capture-failed"
    message = "{model}: torch.export could not capture it: {reason}"
    hint = "call torch.export.export on the module with the same inputs to see the whole story, and mend that place"


class WrongInputs(GraphoptError):
    """A program was called with tensors that are not what it takes."""

    code = "wrong-inputs"
    message = "{model}: {what}"
    hint = "it takes {expected}"


class NotFromProgram(GraphoptError):
    """`Program.from_module` got a module that no program made, or one with several such in it."""

    code = "not-from-program"
    message = "{module}: has {count} of the modules that Program.to_module makes in it, and not one"
    hint = "give the module that Program.to_module returned, or one that has it as its only such part"


class StateMismatch(GraphoptError):
    """A trained module's tensor no longer fits the program that it was made from."""

    code = "state-mismatch"
    message = "{model}: {tensor} is {got} in the module and {want} in the program"
    hint = "training may change values only; to change shapes, change the program"


class CannotWrite(GraphoptError):
    """The output could not be written: no permission, a full disk, a missing folder."""

    code = "cannot-write"
    message = "{file}: cannot be written: {reason}"
    hint = "choose another place with -o; nothing was left half-written"
    exit = Exit.IO_FAILED


class NoRoom(GraphoptError):
    """A tool could not write its temporary files: a full disk, or a limit on the size of files."""

    code = "no-room"
    message = "{folder}: the linker's temporary files cannot be written: {reason}"
    hint = "make room there, or let the variable TMPDIR name another folder; nothing was left half-written"
    exit = Exit.IO_FAILED


class VerificationFailed(GraphoptError):
    """The compiled artefact does not compute what PyTorch computes. Nothing is written then."""

    code = "verification-failed"
    message = (
        "{name}: output {output}{index} is {got} in the artefact and {want} in PyTorch "
        "({count} of {total} elements differ; tolerance {tolerance}; run by {runner} on the {inputs})"
    )
    hint = "compile again with --dump-dir to see every phase; --no-verify writes the bundle as it is, and says so in it"
    exit = Exit.CHECK_FAILED


class ChoiceMayDiffer(VerificationFailed):
    """The same of a program that chooses tokens by what it computes: rounding may have decided between two."""

    hint = (
        "it chooses tokens by their scores, and of two within rounding the artefact may choose the other; other inputs "
        "(--calib), or the model in float32, tell whether that is all. --no-verify writes the bundle as it is, and "
        "says so in it"
    )


class BundleNotFound(GraphoptError):
    """There is nothing at the path of a bundle, or it may not be read."""

    code = "bundle-not-found"
    message = "{file}: cannot be read: {reason}"
    hint = "give the path of a bundle folder, which `graphopt compile MODEL -o model.bundle` writes"
    exit = Exit.IO_FAILED


class NotABundle(GraphoptError):
    """The path exists and is no bundle."""

    code = "not-a-bundle"
    message = "{file}: is not a bundle: {what}"
    hint = "a bundle is a folder with a manifest.json, which `graphopt compile MODEL -o model.bundle` writes"


class BundleCorrupt(GraphoptError):
    """A file of the bundle is missing, damaged or changed since the bundle was made."""

    code = "bundle-corrupt"
    message = "{file}: {what}"
    hint = "copy the bundle again, or compile it again"


class BundleTooNew(GraphoptError):
    """The bundle's format is newer than this graphopt knows."""

    code = "bundle-too-new"
    message = "{file}: has format {found}; this graphopt reads up to format {known}"
    hint = "upgrade graphopt, or compile the bundle again with this one"


class OutputInTheWay(GraphoptError):
    """What stands at the output path is not a bundle that may be replaced."""

    code = "output-in-the-way"
    message = "{file}: {what}, so it is not replaced"
    hint = "choose another place with -o, or remove it yourself"


class BadSample(GraphoptError):
    """A file with input or calibration arrays that cannot be used."""

    code = "bad-sample"
    message = "{file}: {what}"
    hint = "write it with numpy: numpy.save('x.npy', x), or numpy.savez('samples.npz', x=x) with the inputs' names"


class BadImage(GraphoptError):
    """A picture that is missing, may not be read, or is none."""

    code = "bad-image"
    message = "{file}: {reason}"
    hint = "give a picture in a format that Pillow reads, such as .png or .jpg"


class NoTokens(GraphoptError):
    """`explain tokens` of a model whose tokens are not reduced, or that does not say where they go."""

    code = "no-tokens"
    message = "{file}: {reason}"
    hint = "{way_out}"


class BadCalibration(GraphoptError):
    """Calibration data from Python that cannot be used: what a function or an iterable gave."""

    code = "bad-calibration"
    message = "{source}: {what}"
    hint = (
        "give tensors, tuples of them in the order of the inputs, dicts by name, or pairs of these and labels; "
        "the inputs are {expected}"
    )


class BadLabels(GraphoptError):
    """The labels of the calibration data cannot be compared with the model's output."""

    code = "bad-labels"
    message = "{source}: {what}"
    hint = (
        "labels are class numbers, one for each sample or position of the output {output}, or numbers of its shape; "
        "without labels the model's own outputs are used"
    )


class SampleNotFound(GraphoptError):
    """A file with input or calibration arrays is missing or may not be read."""

    code = "sample-not-found"
    message = "{file}: cannot be read: {reason}"
    hint = "give the path of a .npy or .npz file"
    exit = Exit.IO_FAILED


class BadOption(GraphoptError):
    """Options that contradict each other or the model."""

    code = "bad-option"
    message = "{what}"
    hint = "{way_out}"


class BadRecords(GraphoptError):
    """A file of measured times cannot be read, or they are those of another target or machine."""

    code = "bad-records"
    message = "{file}: {reason}"
    hint = "{way_out}"


class UnknownRival(GraphoptError):
    """`bench --against` names an engine that there is no adapter for."""

    code = "unknown-rival"
    message = "--against {rival}: there is no such engine to compare with{near}"
    hint = "known are: {known}"


class BudgetUnreachable(GraphoptError):
    """Every free axis is as short as it may be, and the budget is still not met."""

    code = "budget-unreachable"
    message = "{file}: --{kind} {asked} cannot be met; the least reachable is {least}"
    hint = "ask for {least}, or see what is held back with `graphopt inspect MODEL --pinned`"


class TokensUnreachable(BudgetUnreachable):
    """As few tokens stay as may at a pass's places, and the budget is still not met."""

    message = "{file}: {name} cannot meet --{kind} {asked}; the least reachable is {least}{why}"
    hint = "ask for {least}{ways}"


class NothingToCut(BudgetUnreachable):
    """A budget for a pass that finds nothing in the program that it could cut."""

    code = "nothing-to-cut"
    message = "{file}: --{kind} {asked} cannot be met, because {name} finds nothing to cut: {reason}"
    hint = "`graphopt inspect --axes MODEL` lists what may shrink, `graphopt passes` what other passes cut"


class BudgetNotShared(BudgetUnreachable):
    """Of a budget that a cut and zeros have in common the cut cannot meet its part."""

    code = "budget-not-shared"
    message = (
        "--{kind} {asked} for {name} and {zeros}: {name} was to leave {share} of the program, and the least that it "
        "can is {least}"
    )
    hint = "say what it shall leave, and zeros take the rest: --pass {name}:share={least}"


class CannotShrink(GraphoptError):
    """An axis that must not shrink, or indices that it does not have."""

    code = "cannot-shrink"
    message = "axis {axis} cannot be shrunk so: {reason}"
    hint = "`graphopt inspect --axes` lists the axes, and why some are pinned"


class UnknownTensor(GraphoptError):
    """An annotation names a tensor that the program does not have."""

    code = "unknown-tensor"
    message = "{tensor}: the program has no {what} of that name{near}"
    hint = "names are those of the model's state_dict; patterns such as `layers.*.weight` are taken, too"


class NotAWeight(GraphoptError):
    """An annotation names a tensor that no kernel could take as a sparse matrix."""

    code = "not-a-weight"
    message = "{tensor}: is {what}, not the weight of a linear layer, a matrix product or a convolution"
    hint = "only such weights are annotated; `graphopt inspect` lists the layers"


class FormatNotKept(GraphoptError):
    """A tensor's values are not those of the sparse format that it is said to have."""

    code = "format-not-kept"
    message = "{tensor}: does not keep to {format}: {reason}"
    hint = "{way_out}"


class UnknownPass(GraphoptError):
    """A recipe or --pass names a pass that there is not."""

    code = "unknown-pass"
    message = "{name}: there is no such pass{near}"
    hint = "`graphopt passes` lists them"


class BadRecipe(GraphoptError):
    """What passes shall do is not said in a way that they understand."""

    code = "bad-recipe"
    message = "{what}: {reason}"
    hint = "{way_out}"
