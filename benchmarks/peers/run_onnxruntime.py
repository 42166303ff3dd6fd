"""onnxruntime's CPU provider with all its graph optimisations, one thread. Needs `pip install 'graphopt[onnx]'`."""

import onnxruntime
from worker import serve


def prepare(file, inputs):
    """See `worker.serve`; `file` is ONNX."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {item.name: array for item, array in zip(session.get_inputs(), inputs.values(), strict=True)}
    return lambda: session.run(None, feed)


serve(prepare)
