"""The loop that every Python peer runs: a line of JSON comes in, one goes out.

    {"load": label, "file": model, "inputs": [{"name", "dtype", "shape", "file"}], "result": file}
    {"time": label, "runs": n}                          -> {"seconds": [...]}, after one run that is not counted
    {"drop": label}

It needs numpy and nothing else of graphopt, because peers have environments of their own.
"""

import json
import os
import sys
import time
import traceback

import numpy as np


def serve(prepare):
    """Answer requests until the pipe ends.

    Args:
        prepare: takes the model's file and arrays by input name, in order; returns what runs once and gives its
            outputs as a list.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints does not belong among the replies
    ready = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = answer(request, ready, prepare)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def answer(request, ready, prepare):
    """Carry out one request."""
    if "load" in request:
        run = prepare(request["file"], {item["name"]: read(item) for item in request["inputs"]})
        for _ in range(3):
            outputs = run()
        flat = [np.asarray(output, np.float32).ravel() for output in outputs]
        np.concatenate(flat).tofile(request["result"])
        ready[request["load"]] = run
        return {}
    if "time" in request:
        run = ready[request["time"]]
        run()  # whoever ran before has filled the caches with its own data
        seconds = []
        for _ in range(request["runs"]):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}
    del ready[request["drop"]]
    return {}


def read(item):
    """An input's array."""
    return np.fromfile(item["file"], item["dtype"]).reshape(item["shape"])
