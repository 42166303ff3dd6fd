"""The generated program as its callers see it: memory, outputs, sharing, and use from C."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import graphopt
from graphopt import targets
from graphopt.codegen.lower import compile_program
from tests.programs import tiny

CPU = targets.resolve("cpu")

MAIN = """\
#include "net.h"
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
  const void *weights = net_map_weights(argv[1]);
  if (!weights) return 2;
  float x[2 * 3 + 1], y[2 * 5 + 1];  /* one in front: nothing is aligned */
  for (int i = 0; i < 6; i++) x[1 + i] = (float)atof(argv[2 + i]);
  const void *inputs[] = {x + 1};
  void *outputs[] = {y + 1};
  void *workspace = aligned_alloc(64, net_workspace_bytes() + 64 & ~(size_t)63);
  if (net_run(weights, inputs, outputs, workspace)) return 3;
  for (int i = 0; i < 10; i++) printf("%.9g ", y[1 + i]);
  net_unmap_weights(weights);
  free(workspace);
  return 0;
}
"""


def test_equal_layers_share_one_kernel() -> None:
    """Three linear layers of one shape are three calls of one function, with weights of their own."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    artefact = compile_program(graphopt.capture(net, (torch.zeros(4, 16),)), CPU)
    calls = [kernel.symbol for kernel in artefact.kernels]
    assert len(calls) == 3
    assert len(set(calls)) == 1
    assert artefact.kernels[0].template == "gemm"
    assert len(artefact.weights) >= 3 * 16 * 17 * 4


def test_the_same_program_gives_the_same_bytes() -> None:
    """Compiling twice gives equal sources, objects and weights."""
    first, second = (compile_program(tiny("deit_s"), CPU) for _ in range(2))
    assert first.sources == second.sources
    assert first.objects == second.objects
    assert first.weights == second.weights


def test_outputs_of_every_kind() -> None:
    """An output may be an input, a constant, a view, a scalar, or the same tensor as another output."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(3.0))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = torch.relu(x)
            return x, self.table, y, y, y.reshape(-1), y.t(), y.sum(), x.t()

    x = torch.randn(2, 3)
    with graphopt.compile(Net(), example_inputs=(x,)) as bundle:
        for got, want in zip(bundle.run({"x": x}).values(), Net()(x), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want)


def test_c_program_runs_the_model_without_python(tmp_path: Path) -> None:
    """A C program with header, library and weights gives PyTorch's numbers, from memory of any alignment."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 5), nn.Softmax(-1)), torch.randn(2, 3)
    graphopt.compile(net, example_inputs=(x,), name="net", output=tmp_path / "net.bundle").close()
    (tmp_path / "main.c").write_text(MAIN)
    program = tmp_path / "main"
    bundle = tmp_path / "net.bundle"
    library = next(bundle.glob("*.so"))
    command = [sys.executable, "-m", "ziglang", "cc", f"-I{bundle}", str(tmp_path / "main.c"), str(library)]
    subprocess.run([*command, f"-Wl,-rpath,{bundle}", "-o", str(program)], check=True, capture_output=True)
    arguments = [str(bundle / "weights.bin"), *(repr(float(v)) for v in x.reshape(-1))]
    done = subprocess.run([str(program), *arguments], check=True, capture_output=True, text=True, env={})
    got = torch.tensor([float(v) for v in done.stdout.split()]).reshape(2, 5)
    torch.testing.assert_close(got, net(x), rtol=1e-5, atol=1e-6)


def test_a_missing_or_foreign_weights_file_is_refused(tmp_path: Path) -> None:
    """The C function that maps the weights gives NULL instead of reading past the end of a file."""
    net = nn.Linear(3, 5)
    graphopt.compile(net, example_inputs=(torch.zeros(1, 3),), name="net", output=tmp_path / "net.bundle").close()
    library = ctypes.CDLL(str(next((tmp_path / "net.bundle").glob("*.so"))))
    library.net_map_weights.restype = ctypes.c_void_p
    (tmp_path / "short.bin").write_bytes(bytes(np.zeros(4, np.uint8)))
    assert library.net_map_weights(str(tmp_path / "none.bin").encode()) is None
    assert library.net_map_weights(str(tmp_path / "short.bin").encode()) is None
