"""Encode the zeros of a tflite file: `sparse_tflite.py FILE.tflite`, in place, in LiteRT's environment.

Weights of 1x1 convolutions with zeros become CSR tensors with a DENSIFY operator: the form for which XNNPACK's delegate
turns sparse inference on, where all of the network is CHW-compatible and two thirds of its weights are zero; zeros in
ordinary tensors are not looked for, and no converter writes this. The TRANSPOSE and MEAN that litert-torch writes at
the end becomes a MEAN of NHWC, which is what XNNPACK looks for.
"""

import sys

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

OPS = schema.BuiltinOperator
MOST_KEPT = 0.9  # a weight with fewer zeros is dense


def code_of(model, operator):
    code = model.operatorCodes[operator.opcodeIndex]
    return max(code.builtinCode, code.deprecatedBuiltinCode)


def buffer(model, array):
    """A new buffer with the bytes of `array`; its number."""
    entry = schema.BufferT()
    entry.data = np.frombuffer(array.tobytes(), np.uint8)
    model.buffers.append(entry)
    return len(model.buffers) - 1


def mean_of_nhwc(model, graph):
    """MEAN after TRANSPOSE of an image becomes MEAN over its own axes."""
    made_by = {int(o.outputs[0]): o for o in graph.operators}
    for operator in graph.operators:
        before = made_by.get(int(operator.inputs[0])) if len(operator.inputs) else None
        if code_of(model, operator) != OPS.MEAN or before is None or code_of(model, before) != OPS.TRANSPOSE:
            continue
        order = np.frombuffer(bytes(model.buffers[graph.tensors[before.inputs[1]].buffer].data), np.int32)
        if order.tolist() != [0, 3, 1, 2]:
            continue
        axes = schema.TensorT()
        axes.name, axes.type, axes.shape = b"axes_nhwc", schema.TensorType.INT32, np.array([2], np.int32)
        axes.buffer = buffer(model, np.array([1, 2], np.int32))
        graph.tensors.append(axes)
        operator.inputs = np.array([before.inputs[0], len(graph.tensors) - 1], np.int32)
        graph.operators = [o for o in graph.operators if o is not before]


def encode(model, graph, operator, weight, rows):
    """Make `weight`, that of a 1x1 convolution, a CSR tensor that a DENSIFY operator expands; that operator."""
    kept = rows != 0
    dims = []
    for place, size in enumerate(weight.shape):
        dim = schema.DimensionMetadataT()
        dim.format, dim.denseSize = schema.DimensionType.DENSE, int(size)
        if place == 3:
            dim.format, dim.denseSize = schema.DimensionType.SPARSE_CSR, 0
            dim.arraySegmentsType = dim.arrayIndicesType = schema.SparseIndexVector.Int32Vector
            dim.arraySegments, dim.arrayIndices = schema.Int32VectorT(), schema.Int32VectorT()
            dim.arraySegments.values = np.concatenate([[0], kept.sum(1).cumsum()]).astype(np.int32)
            dim.arrayIndices.values = np.nonzero(kept)[1].astype(np.int32)
        dims.append(dim)
    sparse = schema.TensorT()
    sparse.name, sparse.shape, sparse.type = (weight.name or b"w") + b"_csr", weight.shape, weight.type
    sparse.buffer = buffer(model, rows[kept])
    sparse.sparsity = schema.SparsityParametersT()
    sparse.sparsity.traversalOrder, sparse.sparsity.dimMetadata = np.arange(4, dtype=np.int32), dims
    graph.tensors.append(sparse)
    weight.buffer = 0
    densify = schema.OperatorT()
    densify.opcodeIndex = len(model.operatorCodes) - 1
    densify.inputs = np.array([len(graph.tensors) - 1], np.int32)
    densify.outputs = np.array([operator.inputs[1]], np.int32)
    densify.builtinOptionsType, densify.builtinOptions = schema.BuiltinOptions.DensifyOptions, schema.DensifyOptionsT()
    return densify


def main(path):
    with open(path, "rb") as file:
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(bytearray(file.read()), 0))
    graph = model.subgraphs[0]
    mean_of_nhwc(model, graph)
    entry = schema.OperatorCodeT()
    entry.builtinCode = entry.deprecatedBuiltinCode = OPS.DENSIFY
    entry.version = 1
    model.operatorCodes.append(entry)
    densify = []
    for operator in graph.operators:
        if code_of(model, operator) != OPS.CONV_2D:
            continue
        weight = graph.tensors[operator.inputs[1]]
        data = model.buffers[weight.buffer].data
        if data is None or weight.type != schema.TensorType.FLOAT32 or tuple(weight.shape[1:3]) != (1, 1):
            continue
        rows = np.frombuffer(bytes(data), np.float32).reshape(weight.shape[0], -1)
        if np.count_nonzero(rows) <= MOST_KEPT * rows.size:
            densify.append(encode(model, graph, operator, weight, rows))
    graph.operators = densify + graph.operators
    if not densify:
        model.operatorCodes.pop()
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    with open(path, "wb") as file:
        file.write(builder.Output())


main(sys.argv[1])
