"""Sparse formats: their words, what keeps to them, what is recognised, fingerprints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import BadOption
from graphopt.sparsity import (
    BLOCKS,
    LEAST_ZEROS,
    PATTERNS,
    UNSTRUCTURED,
    Annotation,
    Format,
    as_matrix,
    blocks_kept,
    conforms,
    fingerprint,
    offence,
    parse_annotation,
    parse_format,
    recognise,
    stored,
)

FORMATS = [UNSTRUCTURED, *BLOCKS, *PATTERNS, Format(8, 1, 2, 4), Format(16, 1, 1, 4)]
SIZES = st.integers(64, 130)


def random_matrix(form: Format, outputs: int, inputs: int, seed: int, keep: float = 0.3) -> np.ndarray:
    """A matrix with no zeros but those of the format: `keep` of the blocks, or N of each M columns."""
    generator = np.random.default_rng(seed)
    rows, columns = -(-outputs // form.rows), -(-inputs // form.cols)
    if form.m > 1:
        groups = -(-columns // form.m)
        order = generator.random((rows, groups, form.m)).argsort(-1)
        # Of a last group that is not whole the first N columns, so that all of it is as full as can be.
        order[:, -1] = np.arange(form.m)
        kept = (order < form.n).reshape(rows, -1)[:, :columns]
    else:
        kept = generator.random((rows, columns)) < keep
        kept[0, 0] = True
    full = kept.repeat(form.rows, 0)[:outputs].repeat(form.cols, 1)[:, :inputs]
    return full * generator.uniform(0.1, 1, (outputs, inputs)) * generator.choice([-1, 1], (outputs, inputs))


# Words ----------------------------------------------------------------------------------------------------------------


def test_words():
    """The four families are written as the paper and the command line have them."""
    assert [str(form) for form in (Format(), Format(4, 1), Format(1, 1, 2, 4), Format(8, 1, 2, 4))] == [
        "unstructured",
        "4x1",
        "2:4",
        "8:2:4",
    ]
    assert parse_annotation("dense") is None
    assert str(Annotation(Format(4, 1), 0.1, 0.125)) == "4x1, 10.0% kept, 12.5% stored"
    assert str(Annotation(None, 0.5, 1.0)) == "dense, 50.0% kept"


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_words_are_read_back(form):
    """Every format is the one that its word names."""
    assert parse_format(str(form)) == form


@pytest.mark.parametrize("text", ["", "4", "4x", "x4", "0x1", "5:4", "0:4", "2:4:8:1", "4x1x1", "-1x1", "DENSE", "4X1"])
def test_other_words_are_refused(text):
    """No format has such a word; the error says which do."""
    with pytest.raises(BadOption, match=r"there is no sparse format"):
        parse_annotation(text)


def test_weights_are_matrices_with_channels_fastest():
    """OI stays, IO is transposed, of OIHW the inputs are taps with their channels."""
    weight = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    assert as_matrix(weight)[1].tolist() == weight[1].transpose(1, 2, 0).flatten().tolist()
    assert as_matrix(weight[..., 0, 0]).tolist() == weight[..., 0, 0].tolist()
    assert as_matrix(weight[..., 0, 0], outputs_last=True).tolist() == weight[..., 0, 0].T.tolist()


# What keeps to a format -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(form=st.sampled_from(FORMATS), outputs=st.integers(1, 20), inputs=st.integers(1, 20), seed=st.integers(0, 99))
def test_stored_counts_the_elements_of_kept_blocks(form, outputs, inputs, seed):
    """Element by element: one counts where its block has any that is not zero, at the edges too."""
    matrix = random_matrix(UNSTRUCTURED, outputs, inputs, seed)
    blocks = [
        matrix[r - r % form.rows :][: form.rows, c - c % form.cols :][:, : form.cols]
        for r in range(outputs)
        for c in range(inputs)
    ]
    assert stored(matrix, form) == sum(block.any() for block in blocks)
    assert blocks_kept(torch.from_numpy(matrix), form).shape == (-(-outputs // form.rows), -(-inputs // form.cols))


@settings(max_examples=60, deadline=None)
@given(form=st.sampled_from(FORMATS), outputs=st.integers(1, 70), inputs=st.integers(1, 70), seed=st.integers(0, 99))
def test_matrices_of_a_format_keep_to_it(form, outputs, inputs, seed):
    """Of any size, also where the last blocks and groups are not whole."""
    matrix = random_matrix(form, outputs, inputs, seed)
    assert conforms(matrix, form)
    assert offence(matrix, form) is None
    assert stored(matrix, form) == np.count_nonzero(matrix)


@settings(max_examples=40, deadline=None)
@given(form=st.sampled_from(PATTERNS), outputs=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_one_element_too_many_is_found(form, outputs, seed, data):
    """N:M has no exceptions: the place that is named is in the group that has one more."""
    matrix = random_matrix(form, outputs, 2 * form.m, seed)
    row = data.draw(st.integers(0, outputs - 1))
    column = data.draw(st.sampled_from(np.flatnonzero(matrix[row] == 0).tolist()))
    matrix[row, column] = 1
    assert not conforms(matrix, form)
    at_row, at_column, reason = offence(matrix, form)
    assert (at_row, at_column // form.m) == (row, column // form.m)
    assert matrix[at_row, at_column] != 0
    assert reason.startswith(f"{form.n + 1} of columns {column // form.m * form.m} to ")


def test_a_hole_in_a_block_is_named():
    """Blocks that are kept may have a few zeros, not many; the first is named."""
    matrix = random_matrix(Format(4, 1), 64, 64, 0)
    row, column = map(int, np.argwhere(matrix)[5])
    matrix[row, column] = 0
    assert conforms(matrix, Format(4, 1))
    sparse = random_matrix(UNSTRUCTURED, 64, 64, 0)
    row, column, reason = offence(sparse, Format(4, 1))
    assert sparse[row, column] == 0
    assert sparse[row - row % 4 : row - row % 4 + 4, column].any()
    assert "of the elements of such blocks are not zero" in reason


# What is recognised ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(form=st.sampled_from([UNSTRUCTURED, *BLOCKS]), outputs=SIZES, inputs=SIZES, seed=st.integers(0, 99))
def test_blocks_are_recognised(form, outputs, inputs, seed):
    """Every block format, from random matrices of it, of odd sizes too, from 70 % zeros."""
    assert recognise(random_matrix(form, outputs, inputs, seed)) == form


@settings(max_examples=40, deadline=None)
@given(form=st.sampled_from(PATTERNS), rows=st.sampled_from([1, 8, 16]), outputs=SIZES, inputs=SIZES, data=st.data())
def test_patterns_are_recognised(form, rows, outputs, inputs, data):
    """Every N:M, element by element and in vectors, of odd sizes too."""
    whole = Format(rows, 1, form.n, form.m)
    matrix = random_matrix(whole, outputs, inputs, data.draw(st.integers(0, 99)))
    assert recognise(matrix) == whole


@settings(max_examples=30, deadline=None)
@given(outputs=st.integers(1, 40), inputs=st.integers(1, 40), seed=st.integers(0, 99), keep=st.floats(0, 1))
def test_what_is_recognised_is_true(outputs, inputs, seed, keep):
    """Whatever is recognised holds, in any matrix; nothing is where less than a tenth is zero."""
    matrix = random_matrix(UNSTRUCTURED, outputs, inputs, seed, keep)
    form = recognise(matrix)
    assert form is None or conforms(matrix, form)
    if np.count_nonzero(matrix) > (1 - LEAST_ZEROS) * matrix.size:
        assert form is None


def test_dense_and_empty_matrices_have_no_format():
    """No zeros, a dead weight, nothing but zeros, no elements."""
    dense = np.ones((8, 8))
    assert recognise(dense) is None
    dense[0, 0] = 0
    assert recognise(dense) is None
    assert recognise(np.zeros((8, 8))) is None
    assert recognise(np.zeros((0, 8))) is None


def test_blocks_do_not_reach_over_groups():
    """Groups of 6 outputs take blocks of 2, not of 4; groups of 1 none that are higher than 1."""
    matrix = random_matrix(Format(4, 1), 96, 40, 0)
    assert recognise(matrix, outputs=6) == Format(2, 1)
    assert recognise(matrix, outputs=1) == UNSTRUCTURED


# Fingerprints ---------------------------------------------------------------------------------------------------------


def test_fingerprints_survive_what_lowering_does_to_constants():
    """Transposed, reshaped, permuted, negated, widened: the same; other values or another size: not."""
    values = torch.from_numpy(random_matrix(UNSTRUCTURED, 12, 20, 0)).float()
    mark = fingerprint(values)
    for same in (values.t(), values.reshape(4, 60), -values, values.double(), values.flip(0), values.numpy()):
        assert fingerprint(same) == mark
    assert fingerprint(values.bfloat16()) == fingerprint(values.bfloat16().float()) != mark
    assert fingerprint(values * 2) != mark
    assert fingerprint(torch.cat([values, torch.zeros(1, 20)])) != mark


@pytest.mark.parametrize("text", ["2:0", "3:2", "0x1", "99999999999999999999x1", "1:2:70000"])
def test_sizes_that_make_no_sense(text):
    """What is no format is refused by its sizes, however large."""
    with pytest.raises(BadOption, match="there is no sparse format"):
        parse_format(text)


def test_weights_that_are_not_finite_are_dense():
    """Zeros beside NaN are no sparsity: later layers' zeros would have to meet what comes out."""
    matrix = np.zeros((8, 8), np.float32)
    matrix[0] = 1.0
    assert recognise(matrix) is not None
    matrix[0, 3] = np.nan
    assert recognise(matrix) is None
