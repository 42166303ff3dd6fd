"""OpenVINO's CPU plugin in float32, one thread. Its environment: `setup.sh FOLDER openvino`."""

import openvino
from worker import serve

CONFIG = {
    "INFERENCE_NUM_THREADS": 1,
    "NUM_STREAMS": "1",
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": "f32",
    "ENABLE_CPU_PINNING": False,
    # Without it zeros are never looked for; measured, it makes no difference to float32 models.
    "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": "0.5",
}


def prepare(file, inputs):
    """See `worker.serve`; `file` is ONNX."""
    arrays = list(inputs.values())
    request = openvino.Core().compile_model(file, "CPU", CONFIG).create_infer_request()
    return lambda: list(request.infer(arrays, share_inputs=True, share_outputs=True).values())


serve(prepare)
