"""Model files: what is no model, what is damaged, and what would run foreign code."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from graphopt import model_file
from graphopt.capture import capture
from graphopt.errors import (
    CorruptModel,
    Exit,
    GraphoptError,
    ModelNotFound,
    ModelTooLarge,
    NotAModel,
    UnsafeModel,
    UnsupportedFormat,
)
from tests.graphopt.small import X, write_files

FACTORY = "tests.graphopt.small:Net"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with one small model in every kind of file."""
    return write_files(tmp_path_factory.getbasetemp() / "files")


def test_missing_directory_and_unreadable(tmp_path):
    """A missing file exits with 5, a folder with 2, a file without permission with 5."""
    with pytest.raises(ModelNotFound, match="No such file") as caught:
        capture(tmp_path / "none.pt2")
    assert caught.value.exit is Exit.IO_FAILED
    with pytest.raises(NotAModel, match="is a directory") as other:
        capture(tmp_path)
    assert other.value.exit is Exit.BAD_INPUT
    secret = tmp_path / "secret.pt2"
    secret.write_bytes(b"x")
    secret.chmod(0)
    if not os.access(secret, os.R_OK):  # root may read everything
        with pytest.raises(ModelNotFound, match="Permission denied"):
            capture(secret)


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "error", "what"),
    [
        ("a.pt2", b"", NotAModel, "is empty"),
        ("a.pt2", b"\0" * 1000, CorruptModel, "does not begin as a PyTorch file does"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(100), NotAModel, "is not a model"),
        ("a.txt", b"hello", NotAModel, "is not a model"),
        ("a.onnx", b"\x08\x08", UnsupportedFormat, "ONNX is not yet supported"),
        ("a.pt2", b"\x08\x07\x12\x07pytorch\x1a\x05", UnsupportedFormat, "ONNX is not yet supported"),
        ("a.st", struct.pack("<Q", 20) + b'{"a":{"dtype":"F32"}}', UnsupportedFormat, "safetensors"),
        ("a.zip", _zip({"a/b.txt": b"hello"}), NotAModel, "holds no model"),
        ("a.pt2", _zip({"serialized_exported_program.json": b"{}"}), UnsupportedFormat, "torch 2.7 and older"),
        ("a.pt2", _zip({"m/data/aotinductor/model/x.so": b"\x7fELF"}), UnsupportedFormat, "AOTInductor"),
        ("a.pt2", b"PK\x03\x04" + bytes(500), CorruptModel, "damaged or truncated archive"),
        ("a.pt2", _zip({"m/models/model.json": b"{}"}), CorruptModel, "damaged or truncated exported program"),
        ("a.pt", _zip({"m/data.pkl": b"junk"}), CorruptModel, "damaged or truncated PyTorch file"),
    ],
)
def test_files_that_are_no_models(tmp_path, name, content, error, what):
    """Each kind gives one error of its own class, with exit 2 and a hint."""
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(error, match=what) as caught:
        capture(file, X)
    assert caught.value.exit is Exit.BAD_INPUT
    assert caught.value.way_out
    assert str(file) in str(caught.value)


def test_a_pickle_of_something_else(files):
    """A list of numbers is safely loaded, and refused by name."""
    with pytest.raises(NotAModel, match="holds a list, neither a module nor a state_dict"):
        capture(files / "list.pt", X)


@pytest.mark.parametrize("name", ["net.pt2", "weights.pt", "legacy.pt", "script.pt"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files(files, tmp_path, name, share):
    """A file cut anywhere is damaged, never half-loaded and never a traceback."""
    content = (files / name).read_bytes()
    file = tmp_path / name
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CorruptModel):
        capture(file, X, model_factory=FACTORY)


def test_flipped_bytes_are_noticed(files, tmp_path):
    """One byte changed anywhere in a .pt2 gives a GraphoptError or changes nothing: weights have checksums."""
    content = (files / "net.pt2").read_bytes()
    wanted = capture(files / "net.pt2")(X)
    file = tmp_path / "net.pt2"
    refused = 0
    for place in range(11, len(content), len(content) // 40):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            got = capture(file)(X)
        except GraphoptError:
            refused += 1
        else:
            assert torch.equal(got, wanted)
    assert refused > 10


# Hostile files -------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it touches a file: the stand-in for foreign code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def _rewritten(source: Path, target: Path, change) -> Path:
    """A copy of an archive with its members passed through `change(name, content)`, checksums right."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, change(member.filename, old.read(member)))
    return target


def _pickled_bomb(file: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Bomb(file), buffer)
    return buffer.getvalue()


def test_bomb_goes_off_without_the_guard(tmp_path):
    """The stand-in works: plain torch.load runs it. Else the tests below would prove nothing."""
    torch.load(io.BytesIO(_pickled_bomb(tmp_path / "fired")), weights_only=False)
    assert (tmp_path / "fired").exists()


@pytest.mark.parametrize("where", ["sample_inputs", "weights", "constants", "plain", "legacy"])
def test_nothing_is_unpickled(files, tmp_path, where):
    """Code hidden in any pickled part of a file does not run, and the file is refused as unsafe."""
    fired, bomb = tmp_path / "fired", _pickled_bomb(tmp_path / "fired")
    file = tmp_path / "bomb.pt2"

    def change(name: str, content: bytes) -> bytes:
        if where == "sample_inputs" and "sample_inputs" in name:
            return bomb
        if where == "weights" and name.endswith("weights/weight_0"):
            return bomb
        if where == "weights" and name.endswith("model_weights_config.json"):
            config = json.loads(content)
            for entry in config["config"].values():
                entry["use_pickle"] = entry["path_name"] == "weight_0"
            return json.dumps(config).encode()
        if where == "constants" and name.endswith("model_constants_config.json"):
            entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
            return json.dumps({"config": {"c": entry}}).encode()
        return content

    if where == "plain":
        torch.save({"a": Bomb(fired)}, file)
    elif where == "legacy":
        torch.save({"a": Bomb(fired)}, file, _use_new_zipfile_serialization=False)
    else:
        _rewritten(files / "net.pt2", file, change)
    if where == "constants":
        with zipfile.ZipFile(file, "a") as archive:
            root = archive.namelist()[0].partition("/")[0]
            archive.writestr(f"{root}/data/constants/opaque_obj_0", pickle.dumps(Bomb(fired)))
    with pytest.raises(UnsafeModel) as caught:
        capture(file, X, model_factory=FACTORY)
    assert not fired.exists()
    assert "--unsafe-load" in caught.value.way_out


def test_call_of_no_operator_is_refused(files, tmp_path):
    """A graph that calls torch.load, torch.hub.load or the like is refused before it is built."""
    for target in ("torch.load", "torch.hub.load", "torch.ops.aten.from_file.default", "_operator.methodcaller"):

        def change(name: str, content: bytes, target: str = target) -> bytes:
            return content.replace(b"torch.ops.aten.linear.default", target.encode())

        file = _rewritten(files / "net.pt2", tmp_path / "call.pt2", change)
        with pytest.raises(UnsafeModel, match=f"a call of {target}"):
            capture(file)


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Add(Mul(Integer(2), Symbol('s0', integer=True)), Integer(-1))", True),
        ("FloorDiv(s0 + 1, 2)", True),
        ("s0 >= 2", True),
        ("__import__('os').system('true')", False),
        ("exec(chr(112))", False),
        ("Symbol('x y z')", False),
        ("(lambda: 0)()", False),
        ("[c for c in s0]", False),
        ("s0.__class__", False),
        ("(" * 5000, False),
    ],
)
def test_sizes_are_arithmetic(text, fine):
    """Expressions of symbolic sizes, which sympy evaluates as Python, may only be arithmetic."""
    assert model_file._is_size(text) is fine


def test_zip_bomb(tmp_path):
    """A small file that unpacks to a huge one is refused before it is unpacked."""
    file = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/models/model.json", b" " * 50_000_000)
    with pytest.raises(ModelTooLarge, match="say they unpack to 50,000,000"):
        capture(file)


def test_file_larger_than_memory(tmp_path):
    """A sparse file of 10 TB is refused by its size."""
    file = tmp_path / "huge.pt2"
    try:
        with file.open("wb") as stream:
            stream.truncate(10**13)
    except OSError:
        pytest.skip("the file system has no files of that size")
    with pytest.raises(ModelTooLarge, match="bytes of memory"):
        capture(file)


def test_same_name_twice(tmp_path):
    """Two readers could take two different members for the same; so such an archive is refused."""
    file = tmp_path / "twice.pt2"
    content = _zip({"m/models/model.json": b"{}", "m/models/model.jsoN": b"[]"})
    file.write_bytes(content.replace(b"model.jsoN", b"model.json"))
    with pytest.raises(CorruptModel, match="two members have the same name"):
        capture(file)


def test_only_files_are_opened(tmp_path):
    """A pipe would be waited for, and a device has no end; an empty path is named as such."""
    os.mkfifo(tmp_path / "pipe.pt2")
    for path in (tmp_path / "pipe.pt2", Path("/dev/zero")):
        with pytest.raises(NotAModel, match="not a file"):
            model_file.load(path)
    with pytest.raises(NotAModel, match="the path of the model is empty"):
        capture("")
