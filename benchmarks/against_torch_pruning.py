"""Who prunes more networks correctly: graphopt and Torch-Pruning, on the models of `benchmarks.reach`.

    pip install --no-deps torch-pruning==1.6.1
    python -m benchmarks.against_torch_pruning                # all of them; prints a table and writes JSON

Both are to halve the FLOPs and are judged alike, by PyTorch's own counter: no exception, the pruned network runs on the
example inputs, outputs have the shapes of before and are finite, and at most 60 % of the FLOPs are left. Whether values
are right is not asked. Each tool gets a process of its own per model, with a time limit.

Torch-Pruning is called as its examples do it: BasePruner (which its MetaPruner is) with GroupMagnitudeImportance(p=2),
local pruning with one ratio for all layers; the ratio is what of RATIOS comes nearest to half of the FLOPs. It is told:
* example inputs by name, and an output_transform that gives the tensors of nested outputs;
* ignored_layers: the layers that an output comes from without another weighted layer in between, found in the autograd
  graph, so that it is not blamed for shapes of outputs;
* num_heads: for projections named as usual in a module (or its config) with a number of heads; head dimensions are
  pruned (prune_head_dims), and afterwards attributes such as head_dim are set anew, as in its examples;
* where that fails, once more with these projections among the ignored layers, and then with all layers of modules that
  know a number of heads: the rest of the network may still shrink.
graphopt is told nothing but the model, the inputs and the budget: `benchmarks.reach` has its attempts.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import multiprocessing
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.reach import MODELS, PRELOADED, State, _reason, capture, prune

MOST = 0.6
RATIOS = (0.3, 0.5, 0.4, 0.2, 0.6, 0.7, 0.8, 0.9)
# So many ratios may fail before the others are given up.
_PATIENCE = 3
_PROJECTIONS = re.compile(r"(q|k|v|qkv|query|key|value|(q|k|v|qkv)_proj|(q|k|v)_lin|query_key_value|c_attn|wqkv)", re.I)
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_HEADS_OF_KEYS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "groups")
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "dim_per_head", "d_head", "key_value_proj_dim")
_WIDTHS = ("all_head_size", "inner_dim", "all_head_dim")


def tensors(value: Any) -> list[Any]:
    """The tensors of a nested output."""
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def measured(call: Any) -> tuple[list[Any], int]:
    """Outputs, and FLOPs as PyTorch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    # Where a module is given a parameter, the counter's hooks want gradients; elsewhere they leave things behind.
    for gradients in (False, True):
        try:
            with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
                outputs = [value.detach() for value in tensors(call())]
            break
        except AssertionError as error:
            if gradients or "gradient" not in str(error):
                raise
    return outputs, counter.get_total_flops()


def judge(before: tuple[list[Any], int], after: tuple[list[Any], int]) -> float:
    """The share of the FLOPs that is left. Raises AssertionError where outputs are not as they were."""
    shapes = [[tuple(value.shape) for value in values] for values, _ in (before, after)]
    assert shapes[0] == shapes[1], f"outputs of shape {shapes[1]} instead of {shapes[0]}"
    for old, new in zip(before[0], after[0], strict=True):
        assert bool(new.isfinite().all()) or not bool(old.isfinite().all()), "outputs are not finite"
    assert before[1], "PyTorch counts no FLOPs in it"
    return after[1] / before[1]


# The two tools -------------------------------------------------------------------------------------------------------


def graphopt(name: str) -> float:
    """Capture, cut, and run what is left in PyTorch."""
    module, inputs = MODELS[name]()
    before = measured(lambda: module(**inputs))
    state = State(name)
    capture(state)
    whole = state.program
    prune(state)
    counts = [measured(lambda p=program: p.to_module().eval()(**inputs)) for program in (whole, state.program)]
    assert counts[0][1] <= before[1] * 1.1, "the captured program does more work"
    return judge((before[0], min(before[1], counts[0][1])), counts[1])  # what capture leaves out was read by nothing


def torch_pruning(name: str, *, ignore: str = "") -> float:
    """Try ratios until about half of the FLOPs are left; `ignore` the "projections" of attention, or all of its
    "layers"."""
    module, inputs = MODELS[name]()
    before = measured(lambda: module(**inputs))
    best, reason, failures = None, "", 0
    for ratio in RATIOS:
        pruned = copy.deepcopy(module)
        try:
            _cut(pruned, inputs, ratio, ignore)
            share = judge(before, measured(lambda m=pruned: m(**inputs)))
        except Exception as error:  # another ratio may do
            reason, failures = reason or _reason(error), failures + 1
            if failures == _PATIENCE:
                break
            continue
        if best is None or abs(share - 0.5) < abs(best - 0.5):
            best = share
        if 0.4 <= share <= 0.55:
            break
    if best is None:
        raise AssertionError(reason)
    if best > MOST and reason:
        raise AssertionError(f"{best:.0%} of the FLOPs are left; other ratios: {reason}")
    return best


def _cut(module: Any, inputs: Mapping[str, Any], ratio: float, ignore: str) -> None:
    import torch
    import torch_pruning as tp

    heads, attentions = _heads(module)
    ignored = list(heads) if ignore else []
    if ignore == "layers":
        owners = [m for m in module.modules() if any(isinstance(vars(m).get(own), int) for own in _HEADS)]
        least = [m for m in owners if not any(other is not m and other in owners for other in m.modules())]
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        ignored += [layer for m in least for layer in m.modules() if isinstance(layer, kinds)]
    pruner = tp.pruner.BasePruner(
        module,
        example_inputs=dict(inputs),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=False,
        pruning_ratio=ratio,
        ignored_layers=[*output_layers(module, inputs), *ignored],
        num_heads={} if ignore else dict(heads),
        prune_head_dims=True,
        prune_num_heads=False,
        output_transform=lambda out: [value for value in tensors(out) if value.requires_grad],
    )
    pruner.step()
    for owner, query, count in attentions:
        width = query.out_features if isinstance(query, torch.nn.Linear) else query.weight.shape[-1]
        for names, value in ((_HEAD_SIZES, width // count), (_WIDTHS, width)):
            for own in names:
                if isinstance(getattr(owner, own, None), int):
                    setattr(owner, own, value)


def _heads(module: Any) -> tuple[dict[Any, int], list[tuple[Any, Any, int]]]:
    """How many heads projections have; and attention modules with one projection alone and its heads."""
    heads: dict[Any, int] = {}
    attentions = []

    def number(owner: Any, names: tuple[str, ...]) -> int | None:
        for place in (owner, getattr(owner, "config", None)):
            for own in names:
                if isinstance(value := getattr(place, own, None), int) and value > 1:
                    return value
        return None

    for owner in module.modules():
        own = [(key, child) for key, child in owner.named_children() if _PROJECTIONS.fullmatch(key)]
        count = number(owner, _HEADS)
        if not own or count is None:
            continue
        for key, child in own:
            if getattr(child, "weight", None) is None or child.weight.dim() != 2:
                continue
            of_keys = number(owner, _HEADS_OF_KEYS) if key.lower()[0] in "kv" else None
            heads[child] = of_keys or count
            if key.lower() in ("q", "query", "q_proj", "q_lin"):
                attentions.append((owner, child, count))
    return heads, attentions


def output_layers(module: Any, inputs: Mapping[str, Any]) -> list[Any]:
    """The weighted layers from which an output comes with no other weighted layer in between."""
    import torch

    owners = {id(p): m for m in module.modules() for p in m.parameters(recurse=False)}
    with torch.enable_grad():
        outputs = tensors(module(**inputs))
    todo = [value.grad_fn for value in outputs if value.grad_fn is not None]
    seen, found = set(), []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        direct = []
        for following, _ in node.next_functions:
            while following is not None and type(following).__name__ in ("TBackward0", "TransposeBackward0"):
                following = following.next_functions[0][0]
            if hasattr(following, "variable"):
                direct.append(owners.get(id(following.variable)))
        found += [owner for owner in direct if owner is not None and owner is not module]
        if not direct or re.match(r"(Add|Mul|Cat|Expand|Select|Index|Slice)Backward", type(node).__name__):
            todo += [following for following, _ in node.next_functions]
    return [owner for owner in dict.fromkeys(found) if not list(owner.children())]


# One model, in a process of its own ----------------------------------------------------------------------------------

# Each tool's ways to call it, one after another until one serves.
TOOLS: dict[str, tuple[Callable[[str], float], ...]] = {
    "graphopt": (graphopt,),
    "torch_pruning": (torch_pruning, *(partial(torch_pruning, ignore=what) for what in ("projections", "layers"))),
}


def _run(way: Callable[[str], float], name: str, pipe: Connection) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    try:
        share = way(name)
        verdict: dict[str, Any] = {"ok": share <= MOST, "flops": round(share, 4)}
        if share > MOST:
            verdict["reason"] = f"{share:.0%} of the FLOPs are left"
    except Exception as error:  # whatever it is, it is a cell
        verdict = {"ok": False, "reason": _reason(error)[:200]}
    pipe.send(verdict)


def measure(tool: str, name: str, seconds: float) -> dict[str, Any]:
    """What came of one model in one tool; where no way served, the reason is the first one's."""
    verdicts = []
    for number, way in enumerate(TOOLS[tool], 1):
        verdicts.append(_measure(way, name, seconds) | {"way": number})
        if verdicts[-1]["ok"]:
            return verdicts[-1]
    return verdicts[0] | {"also": [verdict["reason"] for verdict in verdicts[1:]]}


def _measure(way: Callable[[str], float], name: str, seconds: float) -> dict[str, Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(way, name, there), daemon=True)
    start = time.monotonic()
    process.start()
    there.close()
    try:
        verdict = here.recv() if here.poll(seconds) else {"ok": False, "reason": f"not done within {seconds:g} s"}
    except EOFError:
        verdict = {"ok": False, "reason": "the process died"}
    process.kill()
    process.join()
    return verdict | {"seconds": round(time.monotonic() - start, 2)}


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", help="default: all of them")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: both")
    parser.add_argument("--seconds", type=float, default=60.0, help="per model and tool, at most (default: 60)")
    parser.add_argument("-o", "--output", type=Path, default=Path("against_torch_pruning.json"))
    options = parser.parse_args()
    if unknown := [name for name in options.model if name not in MODELS]:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(sorted(MODELS))}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tools = options.tool or list(TOOLS)
    console, rows = Console(), []
    table = Table("model", *tools, "reason", title="pruned to half of the FLOPs")
    for name in options.model or MODELS:
        row = {"model": name, **{tool: measure(tool, name, options.seconds) for tool in tools}}
        rows.append(row)
        cells = [f"{row[t].get('flops', 1):.0%}" if row[t]["ok"] else "[red]failed[/]" for t in tools]
        reasons = "; ".join(f"{t}: {row[t]['reason']}" for t in tools if not row[t]["ok"]).replace("[", r"\[")
        table.add_row(name, *cells, reasons)
        console.print(name, *cells, reasons, highlight=False, soft_wrap=True)
        options.output.write_text(json.dumps({"most": MOST, "rows": rows}, indent=1) + "\n")
    console.print(table)
    for tool in tools:
        console.print(f"{tool}: {sum(row[tool]['ok'] for row in rows)} of {len(rows)}", highlight=False)


if __name__ == "__main__":
    main()
