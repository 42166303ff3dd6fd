"""One model against the peers: its dense program stays loaded in all engines while the sparse ones come and go."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import graphopt
from benchmarks.peers.export import Case
from benchmarks.peers.registry import PEERS, PeerFailed, Worker
from benchmarks.sparse.models import load, sparsify
from benchmarks.sparse.turns import Contestant, bundle_turn, in_turns
from graphopt.arrays import to_numpy
from graphopt.bench import as_list
from graphopt.errors import GraphoptError

TARGETS = {"cpu": ("cpu",), "wasm": ("wasm", "wasm:relaxed")}
Say = Callable[[str], None]


@dataclass
class Settings:
    """What the command line asks for."""

    peers: list[str]
    folder: Path
    environments: Path | None
    seconds: float
    same_weights: bool = False
    own: bool = True
    say: Say = print
    missing: dict[str, str] = field(default_factory=dict)


def make_case(model: str, form: str, zeros: int, settings: Settings, dense: Case | None = None) -> Case:
    """A model with its share of zeros, captured."""
    module, inputs = load(model, settings.folder)
    changed = sparsify(model, module, form, zeros / 100)
    label = f"{model}-{form.replace(':', 'of')}-{zeros}" if zeros else f"{model}-dense"
    program = graphopt.capture(module, inputs, name=model.replace("-", "_"))
    return Case(label, module, inputs, program, changed, settings.folder, settings.environments, dense)


def density(case: Case) -> float:
    """The share of the weights in question that is not zero."""
    after = [pair[1] for pair in case.changed.values()]
    return sum(map(np.count_nonzero, after)) / sum(array.size for array in after)


def reference(case: Case) -> np.ndarray:
    """What PyTorch computes, all outputs in a row."""
    with torch.inference_mode():
        results = case.program.exported.module()(**case.inputs)
    return np.concatenate([array.ravel() for array in as_list(results)]).astype(np.float32)


class Contest:
    """All engines of one kind with one model. Use as a context: it ends the engines."""

    def __init__(self, model: str, kind: str, settings: Settings) -> None:
        self.model, self.kind, self.settings = model, kind, settings
        self.failures: dict[str, str] = {}
        self._stack = contextlib.ExitStack()
        self._workers: dict[str, Worker] = {}
        self._dense: Case | None = None
        self._always: list[Contestant] = []

    def __enter__(self) -> Contest:
        settings = self.settings
        for name in settings.peers:
            if PEERS[name].kind == self.kind and name not in settings.missing:
                worker = Worker(PEERS[name], settings.environments, settings.folder / f"{name}.log")
                self._stack.callback(worker.close)
                self._workers[name] = worker
        self._dense = make_case(self.model, "unstructured", 0, settings)
        self._stack.callback(self._dense.forget)
        self._always = list(self._enter(self._dense, self._stack, list(self._workers)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def row(self, form: str, zeros: int) -> dict[str, Any]:
        """Time one case: sparse and dense weights in all engines that they make a difference to."""
        with contextlib.ExitStack() as stack:
            case, contestants = self._dense, list(self._always)
            assert case is not None
            before = dict(self.failures)
            if zeros:
                case = make_case(self.model, form, zeros, self.settings, self._dense)
                stack.callback(case.forget)
                names = [n for n, w in self._workers.items() if w.peer.gains or self.settings.same_weights]
                contestants += self._enter(case, stack, names)
            dead = {name for name, worker in self._workers.items() if not worker.alive}
            contestants = [one for one in contestants if one.engine not in dead]
            self.settings.say(f"{case.label}, {self.kind}: timing {len(contestants)}")
            in_turns(contestants, self.settings.seconds)
            failures, self.failures = self.failures, before
        return {
            "model": self.model,
            "kind": self.kind,
            "format": form if zeros else "dense",
            "zeros": zeros,
            "density": density(case),
            "engines": [one.to_json() for one in contestants],
            "failures": failures,
        }

    def _enter(self, case: Case, stack: contextlib.ExitStack, names: list[str]) -> Iterator[Contestant]:
        weights = "dense" if case is self._dense else "sparse"
        expected = reference(case)
        for target in TARGETS[self.kind] if self.settings.own else ():
            try:
                yield self._own(case, target, weights, expected, stack)
            except GraphoptError as error:
                self.failures[f"graphopt {target}, {weights}"] = str(error).splitlines()[0]
        for name in names:
            try:
                yield self._peer(case, name, weights, expected, stack)
            except PeerFailed as error:
                self.failures[f"{name}, {weights}"] = str(error)

    def _own(
        self, case: Case, target: str, weights: str, expected: np.ndarray, stack: contextlib.ExitStack
    ) -> Contestant:
        self.settings.say(f"{case.label}: graphopt compiles for {target}")
        output = self.settings.folder / f"{case.label}.{target.replace(':', '-')}.bundle"
        start = time.perf_counter()
        graphopt.compile(case.program, target=target, output=output, verify=False).close()
        self.settings.say(f"{case.label}: compiled for {target} in {time.perf_counter() - start:.0f} s")
        stack.callback(shutil.rmtree, output)
        bundle = stack.enter_context(graphopt.load(output, threads=1))
        inputs = {name: to_numpy(value) for name, value in case.inputs.items()}
        found = np.concatenate([array.ravel() for array in as_list(bundle.run(inputs))])
        name = "graphopt" if target in ("cpu", "wasm") else f"graphopt {target.partition(':')[2]}"
        return Contestant(name, weights, bundle_turn(bundle, inputs), difference(found, expected))

    def _peer(
        self, case: Case, name: str, weights: str, expected: np.ndarray, stack: contextlib.ExitStack
    ) -> Contestant:
        worker = self._workers[name]
        peer = worker.peer
        self.settings.say(f"{case.label}: {name} loads")
        file = case.file(peer.reads_sparse if peer.reads_sparse and weights == "sparse" else peer.reads)
        result = self.settings.folder / f"{name}.result"
        worker.ask({"load": case.label, "file": str(file), "inputs": case.input_files(), "result": str(result)})
        stack.callback(lambda: worker.alive and worker.ask({"drop": case.label}))
        gap = difference(np.fromfile(result, np.float32), expected)
        return Contestant(name, weights, lambda n: worker.ask({"time": case.label, "runs": n})["seconds"], gap)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest gap as a share of the largest value."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))
