"""torch.compile with inductor, its weights frozen, one thread. Needs graphopt's own environment and a C++ compiler."""

import torch
import torch._inductor.config
from worker import serve


def prepare(file, inputs):
    """See `worker.serve`; `file` is what torch.export saves."""
    torch._inductor.config.freezing = True
    torch.set_num_threads(1)
    module = torch.compile(torch.export.load(file).module())
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}

    def run():
        with torch.no_grad():
            results = module(**tensors)
        results = results.values() if isinstance(results, dict) else results
        return list(results) if not isinstance(results, torch.Tensor) else [results]

    return run


serve(prepare)
