"""Rows of foreign MDS streams: what counts as token ids, loss mask and documents, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.core.errors import UserError
from curate.data.mds import Columns, MdsStream, as_sample, write_stream

TOKENS = np.array([5, 7, 0, 1], np.int32)
MASK = [False, True, False, True]


def read(**row):
    return as_sample({"tokens": TOKENS, **row}, Columns(), "data/web, sample 3")


@pytest.mark.parametrize(
    "stored",
    [
        np.array([0, 1, 0, 1], np.uint8),
        np.array([0, 1, 0, 1], np.int64),
        np.array([0, 1, 0, 1], np.float32),
        np.array(MASK),
        [0, 1, 0, 1],
        bytes([0, 1, 0, 1]),
        np.array([-100, 7, -100, 1], np.int64),  # labels
        np.array([-100, 7, -100, 1], np.float32),
    ],
    ids=lambda stored: f"{type(stored).__name__} {getattr(stored, 'dtype', '')} {stored[1]}",
)
def test_masks_of_any_kind_say_the_same(stored):
    assert read(loss_mask=stored).loss_mask.tolist() == MASK
    assert read(loss_mask=stored).sample_id == read(loss_mask=np.array(MASK)).sample_id


def test_without_a_mask_all_tokens_count():
    assert read().loss_mask.all()
    assert read(loss_mask=TOKENS.astype(np.int64)).loss_mask.all()  # labels without an ignored one


@pytest.mark.parametrize(
    "stored",
    [
        np.ones(3, np.uint8),
        np.ones((1, 4), np.uint8),
        np.ones(4, np.int64).tobytes(),  # one byte for each token
        np.array([0, 0.5, 1, 1]),
        np.array([0, np.nan, 1, 1]),
        np.array([7, 0, 1, -100]),  # labels shifted by one
        np.array([-1, 7, -1, 1]),  # another ignored label
        "0101",
        {"mask": 1},
        5,
    ],
    ids=str,
)
def test_what_is_no_mask_is_refused_with_stream_and_sample(stored):
    with pytest.raises(UserError, match=r"loss mask of data/web, sample 3"):
        read(loss_mask=stored)


@pytest.mark.parametrize(
    "stored",
    [
        np.zeros(0, np.int32),
        b"",
        np.ones((1, 4), np.int32),
        np.ones(4, np.float32),
        np.ones(4, bool),
        [0.5, 1.0],
        [[1], [2, 3]],
        "5 7 0 1",
        np.array([1, -1]),
        np.array([1, 1 << 31]),
        np.array([1, (1 << 64) - 1], np.uint64),
        bytes(9),
    ],
    ids=str,
)
def test_what_are_no_token_ids_is_refused_with_stream_and_sample(stored):
    with pytest.raises(UserError, match=r"token ids of data/web, sample 3"):
        read(tokens=stored)


@pytest.mark.parametrize("dtype", ["float32", "int65", "U4", "object"])
def test_a_token_type_that_holds_no_ids_is_refused(dtype):
    with pytest.raises(UserError, match=r"token ids of data/web, sample 3"):
        as_sample({"tokens": bytes(16)}, Columns(tokens_dtype=dtype), "data/web, sample 3")


@pytest.mark.parametrize(
    "stored", [None, 5, "text", ["a", "b"], [["a", 0]], [["a", 0, 5]], [["a", 3, 2]], [[1, "x", 2]]]
)
def test_documents_that_are_no_spans_are_refused(stored):
    with pytest.raises(UserError, match=r"documents of data/web, sample 3"):
        read(documents=stored)
    assert read(documents=[["a", 0, 4]]).documents == [("a", 0, 4)]


VALUES = st.lists(st.sampled_from([-100, -1, 0, 1, 0.5, 5, 7, 2**40]), min_size=3, max_size=5)


@given(VALUES)
def test_any_column_is_a_mask_or_labels_or_refused(stored):
    ones = len(stored) == 4 and set(stored) <= {0, 1}
    labels = len(stored) == 4 and all(value in (-100, token) for value, token in zip(stored, TOKENS, strict=True))
    if ones or labels:
        expected = [value == 1 for value in stored] if ones else [value != -100 for value in stored]
        assert read(loss_mask=np.array(stored)).loss_mask.tolist() == expected
    else:
        with pytest.raises(UserError):
            read(loss_mask=np.array(stored))


def test_an_error_in_a_stream_names_the_sample(tmp_path):
    rows = [{"tokens": TOKENS, "loss_mask": np.ones(4 - (index == 2), np.uint8)} for index in range(4)]
    write_stream(tmp_path / "web", {"tokens": "ndarray:int32", "loss_mask": "ndarray:uint8"}, rows)
    stream = MdsStream(tmp_path / "web")
    assert len(stream[1].tokens) == 4
    with pytest.raises(UserError, match=r"web, sample 2 is uint8 of shape \(3,\) for 4 tokens"):
        stream.catalogue()
