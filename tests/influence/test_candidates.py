"""Pools on a tiny run: what is new, what is probed, what is predicted, and what is refused."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from curate.embeddings.adjoint_estimator import AdjointConfig
from curate.core.errors import UserError
from curate.data.mds import COLUMNS, MdsStream, write_stream
from curate.pools.features import ratios_of
from curate.pools.ngram_slopes import fit, ngrams_of
from curate.pools.open import open_pool
from curate.pools.spread import FeatureReader
from curate.pools.values import PoolValues, ProbeConfig, value_pool
from curate.domains.schema import Scores
from curate.training.target import load_target
from curate.training.token_accounting import consumed, stages, uses
from curate.training.run import Run
from curate.training.samples import read_batches, usable_samples
from tests.tiny import SEQ_LEN, STEPS, TinyLM

CONFIG = ProbeConfig(share=0.5, min_per_domain=5, steps=4, min_rank_correlation=-1.0, rest="features")
SLOPES = CONFIG.model_copy(update={"rest": "slopes"})


@pytest.fixture(scope="module")
def run(folder):
    return Run(folder / "run")


def opened(folder, run, overlap="remove"):
    return open_pool(folder, run, consumed(uses(stages(run))), overlap)


def valued(run, pool, folder, config=CONFIG, own_step="linear", **settings):
    target = load_target(folder / "target.jsonl", run.spec, 100)
    return value_pool(run, pool, [target], config, adjoint=AdjointConfig(own_step=own_step), **settings)


@pytest.fixture(scope="module")
def found(folder, run):
    return valued(run, opened(folder / "data", run), folder)


def test_what_was_trained_on_is_left_out_kept_or_refused(folder, run, caplog):
    used = set(run.steps["sample_ids"].explode())
    with caplog.at_level(logging.WARNING):
        pool = opened(folder / "data", run)
    assert not set(pool.samples["sample_id"]) & used
    kept = opened(folder / "data", run, "keep")
    assert len(kept.samples) == len(pool.samples) + len(used)
    assert f"{len(used)} of the pool's {len(kept.samples)} samples were trained on already" in caplog.text
    assert pool.tokens == {name: SEQ_LEN * len(pool.samples.filter(domain=name)) for name in ("dataclasses", "json")}
    with pytest.raises(UserError, match=r"trained on already \(dataclasses 36, json 36\); set probe.overlap remove"):
        opened(folder / "data", run, "refuse")


def test_every_sample_has_a_value_and_says_where_it_is_from(run, folder, found):
    pool = opened(folder / "data", run)
    assert_frame_equal(
        found.every.select("domain", "index", "sample_id"), pool.samples.select("domain", "index", "sample_id")
    )
    used = dict(found.domains.select("domain", "used").iter_rows())
    for (domain, source), own in found.every.group_by("domain", "source"):
        assert source == "probe" or source == {"predictor": "predicted"}.get(used[domain], used[domain])
        assert len(own) == 22
    assert found.domains["probed"].to_list() == [22, 22]
    assert np.isfinite(found.every["value"].to_numpy()).all()
    Scores.validate(found.probed.select(Scores.column_names()))
    probes = found.every.filter(source="probe").join(found.probed, on="sample_id", suffix="_frame")
    np.testing.assert_allclose(probes["value"] * probes["tokens"], probes["value_frame"], rtol=1e-12)
    assert found.cost_units > 0


def test_where_the_predictor_is_too_weak_the_mean_stands(run, folder, found):
    pool = opened(folder / "data", run)
    weak = valued(run, pool, folder, CONFIG.model_copy(update={"min_rank_correlation": 1.0}))
    assert set(weak.domains["used"]) == {"domain mean"}
    rest = weak.every.filter(source="domain mean")
    assert len(rest) == len(pool.samples) - 44
    for name in ("json", "dataclasses"):
        probed = weak.probed.filter(domain=name)
        mean = probed["value"].sum() / probed["tokens"].sum()
        np.testing.assert_allclose(rest.filter(domain=name)["value"], mean, rtol=1e-9)
    assert_frame_equal(weak.probed, found.probed)
    assert weak.folder == found.folder  # nothing is probed again


def test_a_pool_of_few_samples_is_probed_whole(run, folder):
    whole = valued(run, opened(folder / "data", run), folder, CONFIG.model_copy(update={"min_per_domain": 1000}))
    assert set(whole.domains["used"]) == {"probes"}
    assert set(whole.every["source"]) == {"probe"}


def reshard(source: Path, out: Path, size: int) -> Path:
    """The same samples in another order and in other shards."""
    for path in sorted(source.iterdir()):
        if (path / "index.json").exists():
            stream = MdsStream(path)
            order = np.random.default_rng(0).permutation(len(stream)).tolist()
            write_stream(out / path.name, COLUMNS, [stream.row(i) for i in order], shard_bytes=size)
    return out


def test_resharding_changes_no_value(run, folder, found, tmp_path):
    """Not even a second computation is needed: values are known by content."""
    pool = opened(reshard(folder / "data", tmp_path / "pool", 2500), run)
    again = valued(run, pool, folder)
    assert again.folder == found.folder
    for made in (found.folder, *found.folder.parent.glob("hidden-*")):
        shutil.rmtree(made)
    again = valued(run, pool, folder)
    columns = ["domain", "sample_id", "value", "value_a", "value_b", "source"]
    assert_frame_equal(again.every.select(columns), found.every.select(columns))
    assert again.every["index"].to_list() != found.every["index"].to_list()
    assert_frame_equal(again.domains, found.domains)


def test_hidden_states_are_read_once_for_every_target_and_block_by_block(run, folder, monkeypatch):
    monkeypatch.setattr(TinyLM, "get_output_embeddings", lambda model: model.lm_head, raising=False)
    pool = opened(folder / "data", run)
    whole = valued(run, pool, folder, seed=1)
    (hidden,) = (run.folder / "pools").glob("hidden-*")
    assert [path.name for path in sorted(hidden.glob("*.npy"))] == ["000000.npy"]
    assert np.load(hidden / "000000.npy").shape == (88, 8)
    monkeypatch.setattr("curate.pools.values.mean_hidden_states", None)
    valued(run, pool, folder, seed=2)
    monkeypatch.undo()
    monkeypatch.setattr(TinyLM, "get_output_embeddings", lambda model: model.lm_head, raising=False)
    shutil.rmtree(hidden)
    shutil.rmtree(whole.folder)
    monkeypatch.setattr("curate.pools.spread._BLOCK", 13)
    parts = valued(run, pool, folder, seed=1)
    assert len(list(hidden.glob("*.npy"))) == 7
    same = ["domain", "sample_id", "source", "value"]
    assert_frame_equal(parts.every.select(same), whole.every.select(same), rel_tol=1e-4)
    plain = valued(run, pool, folder, CONFIG.model_copy(update={"hidden_states": False}), seed=1)
    assert plain.domains["spearman"].to_list() != whole.domains["spearman"].to_list()


@pytest.mark.parametrize("own_step", ["linear", "exact"])
def test_slopes_give_what_probing_everything_gives(run, folder, own_step):
    pool = opened(folder / "data", run)
    whole = valued(run, pool, folder, CONFIG.model_copy(update={"share": 1.0}), own_step)
    some = valued(run, pool, folder, SLOPES, own_step)
    assert set(some.every["source"]) == {"probe", "predicted"}
    assert (some.domains["spearman"] > 0.95).all()
    for name in ("json", "dataclasses"):
        rest = some.every.filter(source="predicted", domain=name)
        wanted = rest.select("sample_id").join(whole.every, on="sample_id", maintain_order="left")["value"]
        error = (rest["value"] - wanted).abs().max() / wanted.std()
        assert error < (0.05 if own_step == "linear" else 0.5)
        assert abs(rest["value"].mean() - wanted.mean()) < 0.1 * wanted.std()


def test_slopes_are_read_block_by_block_and_not_again(run, folder, monkeypatch):
    pool = opened(folder / "data", run)
    wanted = valued(run, pool, folder, SLOPES, seed=4)
    shutil.rmtree(wanted.folder)
    monkeypatch.setattr("curate.pools.spread._BLOCK", 13)
    with monkeypatch.context() as patch:
        patch.setattr("curate.pools.values.from_slopes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            valued(run, pool, folder, SLOPES, seed=4)
    assert len(list((wanted.folder / "scratch").glob("slopes-*.npz"))) == 7
    monkeypatch.setattr("curate.pools.slopes.forward_slopes", None)
    found = valued(run, pool, folder, SLOPES, seed=4)
    assert_frame_equal(found.every, wanted.every, rel_tol=1e-3, abs_tol=1e-9)


def test_without_the_rest_the_mean_stands_for_it_and_nothing_more_is_read(run, folder, monkeypatch, caplog):
    pool = opened(folder / "data", run)
    monkeypatch.setattr("curate.pools.slopes.forward_slopes", None)
    with caplog.at_level(logging.INFO):
        found = valued(run, pool, folder, CONFIG.model_copy(update={"rest": "none"}))
    assert set(found.every["source"]) == {"probe", "domain mean"}
    assert "0 for the rest (none)" in caplog.text
    assert "too low" not in caplog.text


def interrupted(*_args, **_settings):
    raise KeyboardInterrupt


def test_an_interrupted_valuation_goes_on(run, folder, monkeypatch):
    pool = opened(folder / "data", run)
    wanted = valued(run, pool, folder, seed=3)
    shutil.rmtree(wanted.folder)
    with monkeypatch.context() as patch:
        patch.setattr("curate.pools.values.spread", interrupted)
        with pytest.raises(KeyboardInterrupt):
            valued(run, pool, folder, seed=3)
    for done in ("loss_gradients", "_added"):  # neither the look ahead nor a probe is needed again
        monkeypatch.setattr(f"curate.pools.probe.{done}", None)
    found = valued(run, pool, folder, seed=3)
    assert_frame_equal(found.every, wanted.every)
    assert not (found.folder / "scratch").exists()


def test_the_cost_is_said_before_and_after(run, folder, caplog):
    with caplog.at_level(logging.INFO):
        valued(run, opened(folder / "data", run), folder, CONFIG.model_copy(update={"steps": 2}))
    messages = [record.message for record in caplog.records]
    before = next(i for i, line in enumerate(messages) if line.startswith("valuing the pool will cost about"))
    after = next(i for i, line in enumerate(messages) if line.startswith("valuing the pool took"))
    assert before < after
    assert any("22 of 44 samples probed, rank correlation" in line for line in messages)


def test_other_data_is_refused(run, folder, tmp_path):
    with pytest.raises(UserError, match=r"the pool .* does not exist"):
        opened(tmp_path / "nowhere", run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no MDS streams"):
        opened(tmp_path / "empty", run)
    used = consumed(uses(stages(run)))
    everything = pl.DataFrame({"sample_id": run.places["sample_id"], "uses": 1})
    with pytest.raises(UserError, match=r"every sample of the pool .* probe.overlap keep"):
        open_pool(folder / "data", run, everything, "remove")
    row = dict(run.streams["json"].row(0))
    long = {**row, "tokens": np.tile(row["tokens"], 2), "loss_mask": np.tile(row["loss_mask"], 2)}
    write_stream(tmp_path / "long" / "json", COLUMNS, [long])
    with pytest.raises(UserError, match=f"sequences of {2 * SEQ_LEN} tokens, the run trains on {SEQ_LEN}"):
        open_pool(tmp_path / "long", run, used, "remove")
    with pytest.raises(UserError, match=f"the run has {STEPS} steps; set probe.steps"):
        valued(run, opened(folder / "data", run), folder, CONFIG.model_copy(update={"steps": STEPS + 1}))


def test_a_pool_of_another_tokenizer_is_refused(run, folder, tmp_path):
    reshard(folder / "data", tmp_path / "pool", 4000)
    for path, words in ((tmp_path / "own.json", {"a": 0}), (tmp_path / "pool" / "tokenizer.json", {"b": 0})):
        Tokenizer(WordLevel(words, unk_token="a")).save(str(path))
    named = Run(folder / "run")
    named.spec = run.spec.model_copy(update={"tokenizer": tmp_path / "own.json"})
    with pytest.raises(UserError, match=r"tokenizer.json is not the tokenizer .* --tokenizer"):
        opened(tmp_path / "pool", named)


def test_token_ids_that_the_model_does_not_have_are_refused(run, folder, tmp_path, monkeypatch):
    row = dict(run.streams["json"].row(0))
    tokens = np.full(SEQ_LEN, 127, np.int32)
    write_stream(tmp_path / "pool" / "json", COLUMNS, [{**row, "tokens": tokens}])
    monkeypatch.setattr(TinyLM, "config", SimpleNamespace(vocab_size=127), raising=False)
    with pytest.raises(UserError, match=r"json, sample 0 has token id 127, the model has a vocabulary of 127"):
        valued(run, opened(tmp_path / "pool", run), folder)


def test_a_domain_that_was_trained_on_whole_is_left_out(run, folder, caplog):
    used = run.places.filter(domain="json").select("sample_id", uses=pl.lit(1, pl.Int64))
    with caplog.at_level(logging.WARNING):
        pool = open_pool(folder / "data", run, used, "remove")
    assert set(pool.tokens) == {"dataclasses"}
    assert "nothing of json is left" in caplog.text


def test_samples_are_chosen_by_the_targets_that_rank_them(tmp_path):
    source = {"a": ("predicted", "domain mean"), "b": ("domain mean", "domain mean"), "c": ("domain mean", "predicted")}
    rows = [
        {"target": target, "domain": domain, "index": 0, "sample_id": ord(domain), "length": 8, "tokens": 4,
         "value": 0.5, "value_a": 0.5, "value_b": 0.5, "source": source[domain][place]}
        for place, target in enumerate(("t", "guard")) for domain in "abc"
    ]  # fmt: skip
    every = pl.DataFrame(rows)
    none = pl.DataFrame()
    found = PoolValues(folder=tmp_path, probed=none, every=every, domains=none, seconds=0.0, cost_units=0.0)
    both, alone = found.chosen_by(["t", "guard"]), found.chosen_by(["t"])
    assert sorted(both["domain"].unique()) == ["a", "c"]
    assert (both["target"].value_counts()["count"] == 2).all()  # the same rows for each target
    assert alone["domain"].to_list() == ["a"]
    assert both["value"].to_list() == [2.0] * 4


def test_what_n_grams_say_counts_alike_for_every_target(run, folder):
    """Whatever the targets' slopes are measured in; a block of features has one scale."""
    samples = usable_samples(run.places)
    probes = samples.gather_every(3)
    told = np.random.default_rng(0).standard_normal((len(probes), 2)) * [1e-3, 1e-6]

    def read(table):
        return read_batches(run, table, 16)

    keys = np.concatenate([ngrams_of(sample) for batch in read(probes) for sample in batch])
    made, _ = fit(
        keys, np.random.default_rng(1).standard_normal((len(keys), 2)) * [1e-3, 1e-6], probes["tokens"].to_numpy(), 0
    )
    target = load_target(folder / "target.jsonl", run.spec, 100)
    reader = FeatureReader(samples, read, None, ratios_of([target], read(probes)), (made, told))
    *others, tokens = reader.of_probes(probes)
    assert len(others) == 2
    np.testing.assert_allclose(tokens, told / told.std(axis=0))
    ((block, features),) = reader.of_all(samples["domain"].unique().to_list())
    wanted = np.concatenate([made.samples(batch) for batch in read(block)]) / told.std(axis=0)
    np.testing.assert_allclose(features[:, -2:], wanted, rtol=1e-6)
