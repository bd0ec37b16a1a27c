"""Candidates held against a run: which are new, and which data is refused."""

import logging

import numpy as np
import polars as pl
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from curate.core.errors import UserError
from curate.data.mds import COLUMNS, write_stream
from curate.selection.candidates import open_candidates, unseen_samples
from curate.selection.config import SelectConfig
from curate.selection.resolve import resolve
from curate.selection.source import open_source
from curate.training.run import Run
from curate.training.token_accounting import seen_uses, stages, uses
from tests.tiny import SEQ_LEN


@pytest.fixture(scope="module")
def run(folder):
    return Run(folder / "run")


def source_with(folder, run, **settings):
    """What a selection draws from, where the candidates are the run's own streams: 72 of 160 samples were seen."""
    config = SelectConfig(target=folder / "target.jsonl", candidates=folder / "data", **settings)
    return open_source(resolve(config, run))


def test_what_was_trained_on_is_left_out_or_kept(folder, run, caplog):
    seen = set(run.steps["sample_ids"].explode())
    with caplog.at_level(logging.WARNING):
        new = source_with(folder, run)
    assert not set(new.usable["sample_id"]) & seen
    assert f"{len(seen)} of 160 " in caplog.text
    kept = source_with(folder, run, filter={"unseen_only": False})
    assert len(kept.usable) == len(new.usable) + len(seen)
    assert new.prior_tokens == {name: SEQ_LEN * len(own) for (name,), own in new.usable.group_by("domain")}
    assert set(new.prior_tokens) == set(run.streams)


def test_streams_are_not_weighted_while_some_of_their_samples_were_trained_on(folder, run):
    with pytest.raises(UserError, match=r"\b72\b.*--mode samples.*filter\.unseen_only"):
        source_with(folder, run, mode="weights")
    assert len(source_with(folder, run, mode="weights", filter={"unseen_only": False}).usable) == 160


def test_a_domain_that_was_trained_on_whole_is_left_out(folder, run, caplog):
    seen = run.unique_samples.filter(domain="json").select("sample_id", uses=pl.lit(1, pl.Int64))
    source = open_candidates(folder / "data", run)
    with caplog.at_level(logging.WARNING):
        left = unseen_samples(folder / "data", source.unique_samples, seen, unseen_only=True)
    assert set(left["domain"]) == {"dataclasses"}
    assert "json" in caplog.records[-1].message


def test_nothing_that_is_new_is_refused(folder, run):
    every = run.unique_samples.select("sample_id", uses=pl.lit(1, pl.Int64))
    with pytest.raises(UserError, match=r"filter\.unseen_only"):
        unseen_samples(folder / "data", run.unique_samples, every, unseen_only=True)
    seen = seen_uses(uses(stages(run)))
    assert len(unseen_samples(folder / "data", run.unique_samples, seen, unseen_only=False)) == 160


def test_folders_without_streams_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        open_candidates(tmp_path / "nowhere", run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        open_candidates(tmp_path / "empty", run)


def test_longer_sequences_are_refused(run, tmp_path):
    row = dict(run.streams["json"].row(0))
    long = {**row, "tokens": np.tile(row["tokens"], 2), "loss_mask": np.tile(row["loss_mask"], 2)}
    write_stream(tmp_path / "long" / "json", COLUMNS, [long])
    with pytest.raises(UserError, match=rf"\b{2 * SEQ_LEN}\b.*--seq_len {SEQ_LEN}"):
        open_candidates(tmp_path / "long", run)


def test_other_columns_are_refused(run, tmp_path):
    write_stream(tmp_path / "other" / "json", {"ids": "ndarray:int32"}, [{"ids": np.arange(SEQ_LEN, dtype=np.int32)}])
    with pytest.raises(UserError, match=r"'tokens'.*\bids\b"):
        open_candidates(tmp_path / "other", run)


def test_another_tokenizer_is_refused(folder, run, tmp_path):
    row = dict(run.streams["json"].row(0))
    write_stream(tmp_path / "new" / "json", COLUMNS, [row])
    for path, words in ((tmp_path / "own.json", {"a": 0}), (tmp_path / "new" / "tokenizer.json", {"b": 0})):
        Tokenizer(WordLevel(words, unk_token="a")).save(str(path))
    named = Run(folder / "run")
    named.spec = run.spec.model_copy(update={"tokenizer": tmp_path / "own.json"})
    with pytest.raises(UserError, match=r"tokenizer\.json.*--tokenizer"):
        open_candidates(tmp_path / "new", named)
    named.spec = run.spec.model_copy(update={"tokenizer": tmp_path / "new" / "tokenizer.json"})
    assert len(open_candidates(tmp_path / "new", named).unique_samples) == 1
