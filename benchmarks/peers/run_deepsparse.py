"""DeepSparse 1.8.0, one core: it finds zeros by itself. Its environment: `setup.sh FOLDER deepsparse`.

The product has ended: this is the last release that installs. It takes ONNX up to IR 9, which `export.py` writes.
"""

import deepsparse
from worker import serve


def prepare(file, inputs):
    """See `worker.serve`; `file` is ONNX with IR <= 9."""
    arrays = list(inputs.values())
    engine = deepsparse.Engine(file, batch_size=1, num_cores=1)
    return lambda: engine.run(arrays)


serve(prepare)
