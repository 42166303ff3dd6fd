"""LiteRT with its XNNPACK delegate, one thread. Its environment: `setup.sh FOLDER litert`."""

from ai_edge_litert.interpreter import Interpreter
from worker import serve


def prepare(file, inputs):
    """See `worker.serve`; `file` is tflite."""
    interpreter = Interpreter(file, num_threads=1)
    interpreter.allocate_tensors()
    details = interpreter.get_input_details()
    for name, array in inputs.items():
        # Named "serving_default_x".
        item = next((item for item in details if item["name"].split(":")[0].endswith(f"_{name}")), details[0])
        interpreter.set_tensor(item["index"], array.astype(item["dtype"]))
    results = [item["index"] for item in interpreter.get_output_details()]

    def run():
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in results]

    return run


serve(prepare)
