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
from benchmarks.sparse.models import FAVOUR, load, sparsify
from benchmarks.sparse.turns import Contestant, bundle_turn, in_turns
from graphopt.arrays import to_numpy
from graphopt.bench import as_list

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


def make_case(model: str, form: str, zeros: int, settings: Settings, favour: bool = False) -> Case:
    """A model with its share of zeros; `favour` as `sparsify` takes it."""
    module, inputs = load(model, settings.folder)
    changed = sparsify(model, module, form, zeros / 100, favour)
    label = f"{model}-{form.replace(':', 'of')}-{zeros}" if zeros else f"{model}-dense"
    label += "-more" if favour else ""
    return Case(label, module, inputs, changed, settings.folder, settings.environments)


def density(case: Case) -> float:
    """The share of the weights in question that is not zero."""
    arrays = case.changed.values()
    return sum(map(np.count_nonzero, arrays)) / sum(array.size for array in arrays)


def reference(case: Case) -> np.ndarray:
    """What PyTorch computes, all outputs in a row."""
    with torch.inference_mode():
        results = case.module(**case.inputs)
    # What transformers return is a mapping only to look at.
    arrays = as_list(dict(results) if hasattr(results, "items") else results)
    return np.concatenate([array.ravel() for array in arrays]).astype(np.float32)


class Contest:
    """All engines of one kind with one model. Use as a context: it ends the engines."""

    def __init__(self, model: str, kind: str, settings: Settings) -> None:
        self.model, self.kind, self.settings = model, kind, settings
        self.failures: dict[str, str] = {}
        self._stack = contextlib.ExitStack()
        self._workers: dict[str, Worker] = {}
        self._dense: Case | None = None
        self._always: list[Contestant] = []
        self._zeros = 0  # of `_unstructured`
        self._unstructured: list[Contestant] = []
        self._inner = contextlib.ExitStack()  # lets go of `_unstructured`

    def __enter__(self) -> Contest:
        settings = self.settings
        for name in settings.peers:
            if PEERS[name].kind == self.kind and name not in settings.missing:
                worker = Worker(PEERS[name], settings.environments, settings.folder / f"{name}.log")
                self._stack.callback(worker.close)
                self._workers[name] = worker
        self._dense = make_case(self.model, "unstructured", 0, settings)
        self._stack.callback(self._dense.forget)
        self._always = [
            *self._own_all(self._dense, "dense", self._stack),
            *self._enter_peers(self._dense, "dense", self._stack, list(self._workers)),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        self._inner.close()
        self._stack.close()

    def row(self, form: str, zeros: int) -> dict[str, Any]:
        """Time one case: dense weights in all engines, sparse ones in those that have kernels for them.

        Where `form` is another format, those engines get unstructured zeros as well, as many: blocks may suit
        graphopt's kernels and not theirs.
        """
        with contextlib.ExitStack() as stack:
            case, contestants = self._dense, list(self._always)
            assert case is not None
            before = dict(self.failures)
            if zeros:
                case = make_case(self.model, form, zeros, self.settings)
                stack.callback(case.forget)
                self._with_unstructured(zeros, case if form == "unstructured" else None)
                contestants += self._unstructured
                contestants += self._own_all(case, form, stack)
                if form != "unstructured":
                    contestants += self._enter_peers(case, form, stack, self._sparse_peers())
            self.settings.say(f"{case.label}, {self.kind}: timing {len(contestants)}")
            in_turns(contestants, self.settings.seconds)
            failures, self.failures = self.failures, before
            failures |= {f"{one.engine}, {one.weights}": one.failure for one in contestants if one.failure}
        return {
            "model": self.model,
            "kind": self.kind,
            "format": form if zeros else "dense",
            "zeros": zeros,
            "density": density(case),
            "engines": [one.to_json() for one in contestants if not one.failure],
            "failures": failures,
        }

    def _sparse_peers(self) -> list[str]:
        return [n for n, w in self._workers.items() if w.peer.gains or self.settings.same_weights]

    def _with_unstructured(self, zeros: int, case: Case | None) -> None:
        """Load unstructured zeros into the peers, where they are not those that are loaded."""
        if self._zeros == zeros:
            return
        self._inner.close()
        self._zeros = zeros
        case = case or make_case(self.model, "unstructured", zeros, self.settings)
        self._unstructured = list(self._enter_peers(case, "unstructured", self._inner, self._sparse_peers()))
        case.forget()

    def _own_all(self, case: Case, weights: str, stack: contextlib.ExitStack) -> Iterator[Contestant]:
        expected = reference(case)
        for target in TARGETS[self.kind] if self.settings.own else ():
            try:
                yield self._own(case, target, weights, expected, stack)
            except Exception as error:  # a row that says so, not the end of a run of hours
                self.failures[f"graphopt {target}, {weights}"] = f"{type(error).__name__}: {error}".splitlines()[0]

    def _enter_peers(
        self, case: Case, weights: str, stack: contextlib.ExitStack, names: list[str]
    ) -> Iterator[Contestant]:
        more = None
        for name in names:
            mine = case
            if weights != "dense" and PEERS[name].wants_more and self.model in FAVOUR:
                if more is None:
                    more = make_case(self.model, weights, self._zeros, self.settings, favour=True)
                    stack.callback(more.forget)
                mine = more
            try:
                yield self._peer(mine, name, weights, stack)
            except Exception as error:
                text = str(error) if isinstance(error, PeerFailed) else f"{type(error).__name__}: {error}"
                self.failures[f"{name}, {weights}"] = (text.splitlines() or [""])[0]

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

    @staticmethod
    def _drop(worker: Worker, label: str) -> None:
        with contextlib.suppress(PeerFailed):
            worker.ask({"drop": label})

    def _peer(self, case: Case, name: str, weights: str, stack: contextlib.ExitStack) -> Contestant:
        worker = self._workers[name]
        peer = worker.peer
        self.settings.say(f"{case.label}: {name} loads")
        file = case.file(peer.reads)
        result = self.settings.folder / f"{name}.result"
        worker.ask({"load": case.label, "file": str(file), "inputs": case.input_files(), "result": str(result)})
        stack.callback(self._drop, worker, case.label)
        gap = difference(np.fromfile(result, np.float32), reference(case))
        return Contestant(name, weights, lambda n: worker.ask({"time": case.label, "runs": n})["seconds"], gap)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest gap as a share of the largest value."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))
