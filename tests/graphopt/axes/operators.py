"""A call of every operator that has a rule, and how many of its atoms may shrink."""

from __future__ import annotations

import torch
import transformers.integrations.moe  # noqa: F401  (registers an operator)

from tests.graphopt.axes.single import Case, Const, T, aten, case

X = T((6, 4, 5))  # three dimensions of any meaning
IMAGE = T((2, 6, 7, 9))
VOLUME = T((2, 6, 3, 4, 5))
SEQUENCE = T((2, 6, 11))
COMPLEX = Const([[1j, 2.0 - 1j, 0.3], [0.1, 0.2j, 0.3 + 2j]], torch.complex128)
MASK = Const([[True, False, True, True]] * 6, torch.bool)


def _pools() -> list[Case]:
    cases = []
    for space, x in ((1, SEQUENCE), (2, IMAGE), (3, VOLUME)):
        for name in ("max_pool", "avg_pool"):
            cases.append(case(getattr(aten, f"{name}{space}d").default, 2, x, [2] * space))
        cases.append(case(getattr(aten, f"adaptive_avg_pool{space}d").default, 2, x, [2] * space))
        nearest = getattr(aten, f"upsample_nearest{space}d").default
        cases.append(case(nearest, 2, x, [8] * space))
    cases += [case(aten.adaptive_max_pool1d.default, 2, SEQUENCE, [2])]
    cases += [case(aten.adaptive_max_pool2d.default, 2, IMAGE, [2, 2])]
    cases += [case(aten._adaptive_avg_pool2d.default, 2, IMAGE, [2, 2])]
    cases += [case(aten.max_pool1d_with_indices.default, 2, SEQUENCE, [2])]
    cases += [case(aten.max_pool2d_with_indices.default, 2, IMAGE, [2, 2])]
    cases += [case(aten.max_pool3d_with_indices.default, 2, VOLUME, [2, 2, 2])]
    cases += [case(aten.upsample_linear1d.default, 2, SEQUENCE, [8], False)]
    cases += [case(aten.upsample_trilinear3d.default, 2, VOLUME, [8, 8, 8], False)]
    names = ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
    cases += [case(getattr(aten, name).default, 2, IMAGE, [8, 8], False) for name in names]
    cases += [case(aten._upsample_nearest_exact2d.default, 2, IMAGE, [8, 8])]
    return cases


def _transforms() -> list[Case]:
    cases = [
        case(getattr(aten, f"fft_{name}").default, 2, X) for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
    ]
    cases += [case(getattr(aten, f"fft_{name}").default, 1, X) for name in ("fft2", "ifft2", "rfft2", "irfft2")]
    cases += [case(getattr(aten, f"fft_{name}").default, 0, X) for name in ("fftn", "ifftn", "rfftn", "irfftn")]
    cases += [case(getattr(aten, f"fft_{name}").default, 2, X, [1]) for name in ("fftshift", "ifftshift")]
    return cases


def _scatters() -> list[Case]:
    index = Const([[0, 3, 1, 2, 0]] * 6)
    source, some = T((6, 5)), Const([2, 0])
    return [
        case(aten.scatter.src, 1, T((6, 7)), 1, index, source),
        case(aten.scatter.value, 1, T((6, 7)), 1, index, 0.5),
        case(aten.scatter_add.default, 1, T((6, 7)), 1, index, source),
        case(aten.scatter_reduce.two, 1, T((6, 7)), 1, index, source, "sum"),
        case(aten.select_scatter.default, 2, X, T((6, 5)), 1, 2),
        case(aten.slice_scatter.default, 2, X, T((6, 2, 5)), 1, 1, 3),
        case(aten.index_add.default, 2, X, 1, some, T((6, 2, 5))),
        case(aten.index_copy.default, 2, X, 1, some, T((6, 2, 5))),
        case(aten.index_fill.int_Scalar, 2, X, 1, some, 2.0),
        case(aten.index_reduce.default, 2, X, 1, some, T((6, 2, 5)), "amax"),
        case(aten.index_put.default, 2, X, [some], T((2, 4, 5))),
        case(aten.index_put.default, 1, X, [some, some], T((2, 5)), True),
        case(aten.index_put.default, 0, X, [None, some], T((6, 2, 5))),
    ]


def _recurrent() -> list[Case]:
    x, h = T((2, 3, 5)), T((1, 2, 4))

    def weights(gates: int, i: int = 5) -> list[T]:
        return [T((gates * 4, i)), T((gates * 4, 4)), T((gates * 4,)), T((gates * 4,))]

    flags = (True, 1, 0.0, False, False, True)
    cases = [
        case(aten.lstm.input, 3, x, [h, h], weights(4), *flags),
        case(aten.gru.input, 3, x, h, weights(3), *flags),
        case(aten.rnn_tanh.input, 3, x, h, weights(1), *flags),
        case(aten.rnn_relu.input, 3, x, h, weights(1), *flags),
        case(aten.lstm_cell.default, 3, T((2, 5)), [T((2, 4)), T((2, 4))], *weights(4)),
        case(aten.gru_cell.default, 3, T((2, 5)), T((2, 4)), *weights(3)),
        case(aten.rnn_tanh_cell.default, 3, T((2, 5)), T((2, 4)), *weights(1)),
        case(aten.rnn_relu_cell.default, 3, T((2, 5)), T((2, 4)), *weights(1)),
    ]
    both = weights(4) * 2 + weights(4, 8) * 2
    states = [T((4, 3, 4))] * 2
    return [*cases, case(aten.lstm.input, 3, x, states, both, True, 2, 0.0, False, True, False)]


def _shapes() -> list[Case]:
    unpooled = T((2, 12, 3, 5))
    return [
        case(aten.view.default, 3, X, [6, 20]),
        case(aten.view.default, 4, X, [3, 2, -1]),
        case(aten.view.default, 2, T((6, 4, 5, 7)), [4, 6, 5, 7]),  # 6 and 4 do not divide each other
        case(aten.reshape.default, 3, X, [24, 5]),
        case(aten._unsafe_view.default, 3, X, [24, 5]),
        case(aten.flatten.using_ints, 3, X, 1),
        case(aten.ravel.default, 3, X),
        case(aten.unsqueeze.default, 3, X, 1),
        case(aten.squeeze.default, 2, T((6, 1, 5))),
        case(aten.squeeze.dim, 2, T((6, 1, 5)), 0),
        case(aten.squeeze.dims, 2, T((6, 1, 5)), [0, 1]),
        case(aten.unflatten.int, 4, X, 0, [3, -1]),
        case(aten.reshape_as.default, 3, X, T((24, 5))),
        case(aten.view_as.default, 3, X, T((24, 5))),
        case(aten.permute.default, 3, X, [2, 0, 1]),
        case(aten.movedim.int, 3, X, 0, 2),
        case(aten.moveaxis.intlist, 3, X, [0, 1], [2, 0]),
        case(aten.transpose.int, 3, X, 0, -1),
        case(aten.swapaxes.default, 3, X, 0, 1),
        case(aten.swapdims.default, 3, X, 0, 1),
        case(aten.t.default, 2, T((3, 4))),
        case(aten.numpy_T.default, 2, T((3, 4))),
        *(case(getattr(aten, name).default, 3, X) for name in ("mT", "mH", "adjoint")),
        case(aten.matrix_H.default, 2, T((3, 4))),
        case(aten.expand.default, 3, T((6, 1, 5)), [6, 4, -1]),
        case(aten.expand_as.default, 3, T((6, 1, 5)), X),
        case(aten.broadcast_to.default, 3, T((4, 5)), [6, 4, 5]),
        case(aten.broadcast_tensors.default, 3, [T((6, 1, 5)), T((4, 1))]),
        case(aten.meshgrid.indexing, 3, [T((3,)), T((4,)), T((5,))], indexing="xy"),
        case(aten.repeat.default, 5, X, [2, 3, 1, 1]),
        case(aten.tile.default, 4, X, [2, 1]),
        case(aten.repeat_interleave.self_int, 4, X, 3, 1, output_size=12),
        case(aten.repeat_interleave.self_int, 4, X, 3),
        case(aten.pixel_shuffle.default, 2, unpooled, 2),
        case(aten.pixel_unshuffle.default, 2, T((2, 3, 6, 10)), 2),
        case(aten.im2col.default, 2, IMAGE, [3, 3], [1, 1], [1, 1], [2, 2]),
        case(aten.col2im.default, 2, T((2, 24, 12)), [4, 5], [2, 2], [1, 1], [0, 0], [1, 1]),
        case(aten.unfold.default, 2, X, 1, 2, 1),
        *(case(getattr(aten, name).default, 2, [6, 5]) for name in ("zeros", "ones")),
        case(aten.full.default, 2, [6, 5], 0.3),
        *(case(getattr(aten, f"new_{name}").default, 5, X, [3, 5]) for name in ("zeros", "ones")),
        case(aten.new_full.default, 5, X, [3, 5], 0.3),
        *(case(getattr(aten, f"{name}_like").default, 3, X) for name in ("zeros", "ones")),
        case(aten.full_like.default, 3, X, 0.3),
        case(aten.arange.default, 0, 5),
        case(aten.linspace.default, 0, 0.0, 1.0, 5),
        case(aten.logspace.default, 0, 0.0, 1.0, 5),
        case(aten.eye.default, 0, 5),
        case(aten.tril_indices.default, 0, 3, 3),
        case(aten.triu_indices.default, 0, 3, 3),
        case(aten.scalar_tensor.default, 0, 5),
        case(aten.one_hot.default, 1, Const([2, 0, 1, 2]), 3),
        case(aten.view_as_complex.default, 2, T((3, 4, 2))),
        *(case(getattr(aten, name).default, 2, COMPLEX) for name in ("view_as_real", "imag", "_conj", "resolve_conj")),
        case(aten.diagonal.default, 1, T((3, 4, 4)), 0, 1, 2),
        case(aten.linalg_diagonal.default, 1, T((3, 4, 4))),
    ]


def _selections() -> list[Case]:
    where = Const([[0, 2], [3, 1]])
    return [
        case(aten.cat.default, 4, [X, T((6, 3, 5))], 1),
        case(aten.concat.default, 4, [X, T((6, 3, 5))], 1),
        case(aten.concatenate.default, 4, [X, T((6, 3, 5))], 1),
        case(aten.cat.default, 3, [T((4, 6)), T((4, 6))], 0),
        case(aten.stack.default, 3, [X, X], 1),
        case(aten.split.Tensor, 4, T((6, 4)), 2),
        case(aten.split_with_sizes.default, 3, T((6, 4)), [2, 4]),
        case(aten.split_copy.Tensor, 4, T((6, 4)), 2),
        case(aten.unsafe_split.Tensor, 4, T((6, 4)), 2),
        case(aten.chunk.default, 3, T((6, 4)), 2),
        case(aten.unsafe_chunk.default, 3, T((6, 4)), 2),
        case(aten.tensor_split.sections, 4, T((7, 4)), 3),
        case(aten.tensor_split.indices, 4, T((7, 4)), [2, 5]),
        case(aten.unbind.int, 2, X, 1),
        case(aten.slice.Tensor, 4, T((6, 4)), 0, 2, 4),
        case(aten.slice.Tensor, 2, T((6, 4)), 0, 1, 9223372036854775807, 2),
        case(aten.slice.Tensor, 1, T((7, 4)), 0, 1, 9223372036854775807, 2),
        case(aten.narrow.default, 4, T((6, 4)), 0, 2, 2),
        case(aten.select.int, 3, T((6, 4)), 0, 2),
        case(aten.index.Tensor, 4, X, [None, where]),
        case(aten.index.Tensor, 3, X, [where, None, where]),
        case(aten.index.Tensor, 4, X, [None, Const([1, 2])]),  # consecutive: a slice
        case(aten._unsafe_index.Tensor, 4, X, [None, where]),
        case(aten.index_select.default, 3, X, 1, Const([3, 0])),
        case(aten.gather.default, 2, T((3, 4)), 1, Const([[0, 3], [1, 1], [2, 0]])),
        case(aten.gather.default, 1, T((3, 4)), 1, Const([[0, 3], [1, 1]])),
        case(aten.take_along_dim.default, 2, T((3, 4)), Const([[0, 3]]), 1),
        case(aten.bucketize.Tensor, 2, T((3, 4)), Const([0.2, 0.5], torch.float64)),
        case(aten.isin.Tensor_Tensor, 2, Const([[0, 3, 1], [4, 4, 5]]), Const([3, 4])),
        case(aten.histc.default, 0, T((6,)), 4, 0, 1),
        case(aten.constant_pad_nd.default, 3, X, [0, 0, 1, 2], 0.3),
        case(aten.pad.default, 3, X, [1, 1], "constant", 0.3),
        case(aten.pad.default, 2, X, [1, 1], "reflect"),
        case(aten._pad_circular.default, 2, X, [1, 1]),
        case(aten.reflection_pad1d.default, 2, X, [1, 1]),
        case(aten.reflection_pad2d.default, 2, IMAGE, [1, 1, 1, 1]),
        case(aten.reflection_pad3d.default, 2, VOLUME, [1, 1, 1, 1, 1, 1]),
        case(aten.replication_pad1d.default, 2, X, [1, 1]),
        case(aten.replication_pad2d.default, 2, IMAGE, [1, 1, 1, 1]),
        case(aten.replication_pad3d.default, 2, VOLUME, [1, 1, 1, 1, 1, 1]),
        case(aten.roll.default, 2, X, [1], [1]),
        case(aten.flip.default, 1, X, [0, 1]),
        case(aten.rot90.default, 1, X, 1, [0, 1]),
        *(case(getattr(aten, name).default, 2, X, 1) for name in ("cumsum", "cumprod", "cummax", "cummin")),
        case(aten.logcumsumexp.default, 2, X, 1),
        case(aten.diff.default, 2, X, 1, 1),
        *(case(getattr(aten, name).default, 1, X) for name in ("tril", "triu")),
        case(aten.topk.default, 2, X, 2, 1),
        case(aten.sort.default, 2, X, 1),
        case(aten.argsort.default, 2, X, 1),
        case(aten.kthvalue.default, 2, X, 2, 1),
        case(aten.msort.default, 2, X),
    ]


def _reductions() -> list[Case]:
    cases = [case(aten.sum.dim_IntList, 3, X, [1], True), case(aten.sum.default, 3, X)]
    cases += [case(aten.nansum.default, 3, X, [1]), case(aten.count_nonzero.default, 3, X, 1)]
    cases += [case(aten.any.dim, 2, MASK, 1), case(aten.all.dim, 2, MASK, 1)]
    cases += [case(aten.linalg_vector_norm.default, 3, X, 2, [1]), case(aten.norm.ScalarOpt_dim, 3, X, 1, [1])]
    cases += [case(aten.linalg_vector_norm.default, 2, X, -1, [1])]
    for name in ("mean", "nanmean"):
        cases.append(case(getattr(aten, name).dim if name == "mean" else aten.nanmean.default, 3, X, [1]))
    cases += [case(getattr(aten, name).correction, 3, X, [1], correction=0) for name in ("var", "std")]
    cases += [case(getattr(aten, name).correction, 3, X, [1], correction=0) for name in ("var_mean", "std_mean")]
    cases += [case(getattr(aten, name).default, 3, X, [1], True) for name in ("amax", "amin", "logsumexp")]
    cases += [case(aten.prod.dim_int, 3, X, 1), case(aten.aminmax.default, 3, X, dim=1)]
    cases += [case(getattr(aten, name).default, 2, X, 1) for name in ("argmax", "argmin", "mode")]
    cases += [case(getattr(aten, name).dim, 2, X, 1) for name in ("max", "min", "median")]
    cases += [case(getattr(aten, name).default, 3, X) for name in ("max", "min", "median")]
    cases += [case(aten.max.other, 3, X, T((4, 5)))]
    cases += [case(getattr(aten, name).default, 3, X, 1, False) for name in ("_softmax", "_log_softmax")]
    cases += [case(getattr(aten, name).int, 3, X, 1) for name in ("softmax", "log_softmax")]
    return [*cases, case(aten._safe_softmax.default, 3, X, 1), case(aten.glu.default, 3, X, 0)]


def _norms() -> list[Case]:
    four, channels = [T((4, 5))] * 2, [T((6,))] * 4
    return [
        case(aten.layer_norm.default, 3, X, [4, 5], *four),
        case(aten.layer_norm.default, 3, X, [5]),
        case(aten.native_layer_norm.default, 3, X, [4, 5], *four, 1e-5),
        case(aten.rms_norm.default, 3, X, [4, 5], four[0]),
        case(aten._fused_rms_norm.default, 3, X, [4, 5], four[0], 1e-5),
        case(aten.group_norm.default, 5, IMAGE, 3, *channels[:2]),
        case(aten.group_norm.default, 4, IMAGE, 6, *channels[:2]),
        case(aten.group_norm.default, 4, IMAGE, 1),
        case(aten.batch_norm.default, 4, IMAGE, *channels, False, 0.1, 1e-5, False),
        case(aten._native_batch_norm_legit_no_training.default, 4, IMAGE, *channels, 0.1, 1e-5),
        case(aten.instance_norm.default, 4, IMAGE, *channels[:2], None, None, True, 0.1, 1e-5, False),
    ]


def _products() -> list[Case]:
    batched = (T((2, 3, 4)), T((2, 4, 5)))
    return [
        case(aten.linear.default, 4, T((2, 3, 4)), T((5, 4)), T((5,))),
        case(aten.linear.default, 2, T((4,)), T((5, 4))),
        case(aten.mm.default, 3, T((3, 4)), T((4, 5))),
        case(aten.bmm.default, 4, *batched),
        case(aten.mv.default, 2, T((3, 4)), T((4,))),
        case(aten.dot.default, 1, T((4,)), T((4,))),
        case(aten.vdot.default, 1, T((4,)), T((4,))),
        case(aten.outer.default, 2, T((4,)), T((5,))),
        case(aten.inner.default, 4, X, T((3, 5))),
        case(aten.addr.default, 2, T((3, 4)), T((3,)), T((4,))),
        case(aten.bilinear.default, 4, T((2, 3)), T((2, 4)), T((5, 3, 4)), T((5,))),
        case(aten.cdist.default, 4, T((2, 3, 4)), T((2, 5, 4))),
        case(aten.embedding.default, 3, T((9, 5)), Const([[1, 8, 3], [0, 2, 1]])),
        case(aten.matmul.default, 5, T((7, 1, 3, 4)), T((2, 4, 5))),
        case(aten.matmul.default, 2, T((4,)), T((4, 5))),
        case(aten.matmul.default, 3, T((2, 3, 4)), T((4,))),
        case(aten.linalg_matmul.default, 4, *batched),
        case(aten.addmm.default, 3, T((5,)), T((3, 4)), T((4, 5))),
        case(aten.baddbmm.default, 4, T((2, 1, 5)), *batched),
        case(aten.addmv.default, 2, T((3,)), T((3, 4)), T((4,))),
        case(aten.tensordot.default, 4, X, T((5, 6, 3)), [0, 2], [1, 0]),
        case(aten.cosine_similarity.default, 3, X, T((1, 4, 5)), 1),
        case(aten.pairwise_distance.default, 1, T((3, 4)), T((3, 4))),
        case(aten.linalg_vecdot.default, 3, X, X, dim=1),
        case(aten.einsum.default, 4, "bmk,bkn->bmn", list(batched)),
        case(aten.einsum.default, 3, "ij,jk", [T((3, 4)), T((4, 5))]),
        case(aten.einsum.default, 4, "...i,ji->...j", [X, T((3, 5))]),
        case(aten.einsum.default, 1, "ii->i", [T((4, 4))]),
        case(aten.prelu.default, 3, X, T((4,))),
        case(aten.prelu.default, 3, X, T((1,))),
    ]


# Rows 0 and 1 meet the first expert's matrix, 2 to 5 the third's; row 6 meets none.
_ROWS_END = Const([2, 2, 6], torch.int32)
BY_EXPERT = [
    case(torch.ops.transformers.grouped_mm_fallback.default, 2, T((7, 4)), T((3, 4, 5)), _ROWS_END),
    case(aten._grouped_mm.default, 2, T((7, 16)), T((3, 16, 24)), Const([2, 2, 7], torch.int32)),
]


def _convolutions() -> list[Case]:
    cases = [
        case(aten.conv1d.default, 3, SEQUENCE, T((8, 6, 3)), T((8,))),
        case(aten.conv1d.default, 2, T((6, 11)), T((8, 6, 3)), T((8,))),
        case(aten.conv2d.default, 3, IMAGE, T((8, 6, 3, 3)), T((8,))),
        case(aten.conv2d.default, 2, IMAGE, T((6, 1, 3, 3)), T((6,)), [1, 1], [1, 1], [1, 1], 6),
        case(aten.conv2d.default, 3, IMAGE, T((12, 1, 3, 3)), None, [1, 1], [1, 1], [1, 1], 6),
        case(aten.conv2d.default, 4, IMAGE, T((9, 2, 3, 3)), T((9,)), [1, 1], [1, 1], [1, 1], 3),
        case(aten.conv2d.padding, 3, IMAGE, T((8, 6, 3, 3)), None, [1, 1], "same"),
        case(aten.conv3d.default, 3, VOLUME, T((8, 6, 2, 2, 2)), T((8,))),
        case(aten.conv_transpose1d.default, 3, SEQUENCE, T((6, 8, 3)), T((8,))),
        case(aten.conv_transpose2d.input, 3, IMAGE, T((6, 8, 3, 3)), T((8,))),
        case(aten.conv_transpose2d.input, 4, IMAGE, T((6, 3, 2, 2)), T((9,)), [2, 2], [0, 0], [0, 0], 3),
        case(aten.conv_transpose3d.input, 3, VOLUME, T((6, 8, 2, 2, 2)), T((8,))),
        case(aten.channel_shuffle.default, 3, IMAGE, 3),
        case(aten.native_channel_shuffle.default, 3, IMAGE, 3),
        case(aten.grid_sampler.default, 2, IMAGE, T((2, 3, 4, 2)), 0, 0, False),
        case(aten.grid_sampler_2d.default, 2, IMAGE, T((2, 3, 4, 2)), 0, 0, False),
    ]
    for transposed, weight in ((False, T((9, 2, 3, 3))), (True, T((6, 3, 3, 3)))):
        more = ([1, 1], [1, 1], [1, 1], transposed, [0, 0], 3)
        cases.append(case(aten.convolution.default, 4, IMAGE, weight, T((9,)), *more))
    return cases


def _attention() -> list[Case]:
    q, k, v = T((2, 6, 5, 8)), T((2, 3, 7, 8)), T((2, 3, 7, 4))
    same = T((2, 6, 7, 8))
    op = aten.scaled_dot_product_attention.default
    mask = Const([[True] * 7] * 3 + [[False] + [True] * 6] * 2, torch.bool)
    return [
        case(op, 6, q, same, T((2, 6, 7, 4))),
        case(op, 6, q, same, same, T((5, 7)), scale=0.3),
        case(op, 4, q, T((2, 6, 5, 8)), T((2, 6, 5, 8)), None, 0.0, True),
        case(op, 7, q, k, v, enable_gqa=True),
        case(op, 4, T((5, 8)), T((7, 8)), T((7, 4)), mask),
    ]


CASES: list[Case] = [
    *_pools(), *_transforms(), *_scatters(), *_recurrent(), *_shapes(), *_selections(), *_reductions(), *_norms(),
    *_products(), *BY_EXPERT, *_convolutions(), *_attention(),
]  # fmt: skip
