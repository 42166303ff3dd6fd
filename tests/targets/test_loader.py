"""The ES module loader, in plain Node."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from graphopt.targets import resolve
from graphopt.targets.loader import ARRAYS, declarations
from graphopt.targets.toolchain import link, runtime_folder
from tests.targets.artefacts import COLUMNS, ROWS, artefact

_PRELUDE = """
import { load } from "./tiny.mjs";
import { readFileSync } from "node:fs";
const inputs = () => ({ x: new Float32Array(37 * 64).fill(3), ids: BigInt64Array.from([1n, -2n, 3n, 4n, 5n]) });
const refusal = (act) => { try { act(); } catch (error) { return `${error.name}: ${error.message}`; } return "none"; };
const refused = (act) => act().then(() => "none", (error) => `${error.name}: ${error.message}`);
const out = (value) => console.log(JSON.stringify(value));
"""


@pytest.fixture
def node(linked):
    """Run a script beside the loader; what it prints, as JSON."""

    def run(script, folder=None):
        folder = folder or linked("wasm")[0]
        done = subprocess.run(
            [shutil.which("node") or "node", "--input-type=module", "-e", _PRELUDE + script],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_plain_node_runs_the_model(node):
    """Typed arrays by name; int64 comes as BigInt, bool as bytes."""
    got = node("""
        const model = await load();
        const { y, next, odd } = model.run(inputs());
        out({ y: Array.from(y.slice(0, 64)), kind: y.constructor.name, length: y.length,
              next: Array.from(next, String), odd: Array.from(odd), inputs: model.inputs });
    """)
    assert got["y"] == [max(6 + 2 * (j - 30), 0) for j in range(COLUMNS)]
    assert (got["kind"], got["length"]) == ("Float32Array", ROWS * COLUMNS)
    assert got["next"] == ["2", "-1", "4", "5", "6"]
    assert got["odd"] == [1, 0, 1, 0, 1]
    assert got["inputs"][1] == {"name": "ids", "dtype": "int64", "shape": [5], "length": 5}


def test_files_may_be_given_as_bytes_module_url_or_path(node):
    """And instances do not share memory: one may be disposed of."""
    got = node("""
        const module = new WebAssembly.Module(readFileSync("tiny.wasm"));
        const weights = readFileSync("weights.bin");
        const padded = new Uint8Array(weights.length + 8); padded.set(weights, 8);
        const models = [
          await load({ wasm: module, weights }), await load({ wasm: "tiny.wasm", weights: "weights.bin" }),
          await load({ wasm: readFileSync("tiny.wasm"), weights: padded.subarray(8) }), await load(),
        ];
        const first = models[0].run(inputs()).y;
        const rest = models.slice(1).map((model) => model.run(inputs()).y);
        models[0].dispose();
        out({ same: rest.map((y) => y.every((v, i) => v === first[i])), gone: refusal(() => models[0].run(inputs())),
              alive: models[1].run(inputs()).y[40] });
    """)
    assert got == {"same": [True] * 3, "gone": "Error: tiny: the model was disposed of", "alive": 26}


def test_wrong_inputs_are_told_apart(node):
    """Name, type, length, and nothing at all."""
    got = node("""
        const model = await load();
        const run = (change) => refusal(() => model.run({ ...inputs(), ...change }));
        out([refusal(() => model.run()), refusal(() => model.run({ x: inputs().x })), run({ z: 1 }),
             run({ x: new Float64Array(5) }), run({ x: new Float32Array(5) }), run({ ids: [1, 2, 3, 4, 5] })]);
    """)
    wanted = "Float32Array of 2368 elements, float32[37, 64]"
    ids = "BigInt64Array of 5 elements, int64[5]"
    assert got == [
        "TypeError: tiny: inputs must be an object, by name",
        f"TypeError: tiny: input ids is missing; it is a {ids}",
        "TypeError: tiny: there is no input z; it takes x, ids",
        f"TypeError: tiny: input x is a Float64Array, not a {wanted}",
        f"RangeError: tiny: input x has 5 elements, not a {wanted}",
        f"TypeError: tiny: input ids is a Array, not a {ids}",
    ]


def test_wrong_files_are_told_apart(node):
    """Another model's weights, something else than a module, no file."""
    got = node("""
        const bytes = new Uint8Array(3);
        const given = [{ weights: bytes }, { wasm: bytes }, { weights: 5 }, { wasm: "missing" }];
        out(await Promise.all(given.map((options) => refused(() => load(options)))));
    """)
    assert got[0] == "RangeError: tiny: the weights have 3 bytes, not 256: another model's?"
    assert got[1].startswith("Error: tiny: this engine cannot compile the module, which needs SIMD: ")
    assert got[2] == "TypeError: tiny: weights must be bytes, a URL or a path, not number"
    assert "ENOENT" in got[3]


def test_memory_that_grows_during_a_run_is_looked_up_again(node, tmp_path):
    """A kernel's own buffer grows the memory, which detaches every older view; the freed block serves the next run."""
    target = resolve("wasm")
    extra = (
        "void *TVMBackendAllocWorkspace(int, int, uint64_t, int, int); int TVMBackendFreeWorkspace(int, int, void *);"
    )
    before = "char *own = TVMBackendAllocWorkspace(1, 0, 1 << 20, 0, 8); own[0] = own[(1 << 20) - 1] = 1; " + (
        "TVMBackendFreeWorkspace(1, 0, own);"
    )
    link(artefact(target, extra=extra, before=before), target, "bundle", tmp_path)
    got = node(
        """
        let memory;
        const instantiate = WebAssembly.instantiate;
        WebAssembly.instantiate = async (...given) => {
          const made = await instantiate(...given);
          memory = made.exports.memory;
          return made;
        };
        const model = await load(), sizes = [memory.buffer.byteLength];
        const values = [0, 1, 2].map(() => {
          const { y } = model.run(inputs());
          sizes.push(memory.buffer.byteLength);
          return y[40];
        });
        out({ values, sizes });
        """,
        tmp_path,
    )
    assert got["values"] == [26, 26, 26]
    assert got["sizes"][1] - got["sizes"][0] == (1 << 20) + 65536
    assert got["sizes"][1:] == [got["sizes"][1]] * 3


def test_a_failing_kernel_is_numbered(node, tmp_path):
    """NAME_run's negative number, made readable."""
    target = resolve("wasm")
    link(artefact(target, before="return -7;"), target, "bundle", tmp_path)
    got = node("const model = await load(); out(refusal(() => model.run(inputs())));", tmp_path)
    assert got == "Error: tiny: kernel 7 failed"


def test_types_are_this_models(linked):
    """Every input and output by name, with its array type; no placeholder is left."""
    folder, made = linked("wasm")
    text = (folder / "tiny.d.mts").read_text()
    assert text == declarations(made, runtime_folder())
    assert '  "x": Float32Array;' in text
    assert '  "ids": BigInt64Array;' in text
    assert '  "odd": Uint8Array;' in text
    assert "__" not in text


def test_every_dtype_has_an_array_in_both_languages():
    """The loader's table and the declarations' are the same."""
    for file in ("loader.mjs", "run.mjs"):
        text = (runtime_folder() / file).read_text()
        assert all(f"{dtype}: {array}" in text for dtype, array in ARRAYS.items()), file
    assert all(f'"{dtype}"' in (runtime_folder() / "loader.d.mts").read_text() for dtype in ARRAYS)
