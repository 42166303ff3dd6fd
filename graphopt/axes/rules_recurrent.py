"""Rules of recurrent layers and of their single steps, where they are one operator."""

from __future__ import annotations

from graphopt.axes import axis as ax
from graphopt.axes.call import Call, Dims, GaveUp, Several, rule


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(call: Call) -> Several:
    """Gates are stacked in the first dimension of every weight; the state is one axis throughout the call."""
    if not call.has("input"):
        raise GaveUp("packed sequences")
    x = call.dims(call.arg("input"))
    states = call.arg("hx")
    states = list(states) if isinstance(states, (list, tuple)) else [states]
    two = 2 if call.arg("bidirectional") else 1
    params, biased, layers = list(call.arg("params")), call.arg("has_biases"), int(call.arg("num_layers"))
    per = len(params) // (layers * two)
    if per != (4 if biased else 2):
        raise GaveUp("projected states")
    hidden = call.dims(params[1])[1]
    gates = call.dims(params[1])[0].extent // hidden.extent
    incoming = x[-1]
    call.role(hidden, "neuron")
    for layer in range(layers):
        for side in range(two):
            own = params[per * (two * layer + side) :][:per]
            for place, param in enumerate(own):
                dims = call.dims(param)
                gate = call.fresh([gates], pin="gates")[0]
                call.unify(dims[0], ax.product([gate, hidden]))
                if place < 2:
                    call.unify(dims[1], incoming if place == 0 else hidden)
                    call.contracted(param, 1)
        incoming = ax.concatenation([hidden] * two)
    results = [[*x[:-1], incoming]]
    if len(x) == 3:
        time, batch = (x[1], x[0]) if call.arg("batch_first") else (x[0], x[1])
    else:
        time, batch = x[0], None
    call.pin(time, "one step after another")
    for state in states:
        dims = call.dims(state)
        call.pin(dims[0], "layers of states")
        call.unify(dims[-1], hidden)
        if batch is not None:
            call.unify(dims[1], batch)
        results.append([dims[0], *dims[1:-1], hidden])
    return results


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(call: Call) -> Dims | Several:
    """One step: gates are stacked in the first dimension of the weights."""
    x, states = call.dims(call.arg("input")), call.arg("hx")
    states = list(states) if isinstance(states, (list, tuple)) else [states]
    hidden = call.dims(states[0])[-1]
    call.role(hidden, "neuron")
    for state in states:
        dims = call.dims(state)
        call.unify(dims[-1], hidden)
        call.tie(dims[:-1], x[:-1])
    for name, incoming in (("w_ih", x[-1]), ("w_hh", hidden), ("b_ih", None), ("b_hh", None)):
        dims = call.dims(call.arg(name))
        if dims:
            gates = call.pinned_axis(dims[0].extent // hidden.extent, "gates")
            call.unify(dims[0], ax.product([gates, hidden]))
        if incoming is not None:
            call.unify(dims[1], incoming)
            call.contracted(call.arg(name), 1)
    result = [*x[:-1], hidden]
    return [list(result) for _ in call.shapes] if isinstance(call.node.meta["val"], (list, tuple)) else result
