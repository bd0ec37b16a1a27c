"""Domains divided into parts: every sample in one of them, by its text, wherever it lies."""

from collections import Counter

import polars as pl
import pytest

from curate.errors import UserError
from curate.formats.mds import COLUMNS, MdsStream, content_id, write_stream
from curate.mixture.constraints import MixtureConfig
from curate.mixture.record import read_mixture
from curate.pools.values import ProbeConfig
from curate.select import select
from curate.selection import SelectConfig
from curate.shards.choose import ShardsConfig
from curate.shards.grain import Grain, GrainConfig, divide, mixture_of_parts
from curate.tracking import TrackingConfig
from curate.trajectory.run import Run
from curate.trajectory.samples import trained_tokens
from tests.tiny import SEQ_LEN

BY = pytest.mark.parametrize("by", ["clusters", "shards"])


def selected(folder, **settings):
    given = {
        "run": folder / "run", "target": folder / "target.jsonl", "min_target_tokens": 100, "mode": "filter",
        "budget_tokens": 60 * SEQ_LEN, "tracking": TrackingConfig(mode="none"),
    }  # fmt: skip
    config = SelectConfig(**{**given, **settings})
    return select(config, Run(config.run, config.streams))


def grain_of(run, by, **settings):
    return divide(run, trained_tokens(run), GrainConfig(by=by, **settings), seed=0)


@BY
def test_every_sample_is_in_one_part_of_its_domain(folder, by):
    run = Run(folder / "run")
    grain = grain_of(run, by, clusters=3)
    parts = grain.stock.places
    joined = run.places.join(parts, on=["sample_id", "index", "length"], suffix="_part")
    assert len(joined) == len(run.places) == len(parts)
    assert all(grain.parents[row["domain_part"]] == row["domain"] for row in joined.iter_rows(named=True))
    for row in parts.sample(20, seed=0).iter_rows(named=True):
        assert grain.stock.streams[row["domain"]][row["index"]].sample_id == row["sample_id"]
    whole = trained_tokens(run)
    for domain, tokens in whole.items():
        own = sum(count for part, count in grain.trained.items() if grain.parents[part] == domain)
        assert own == pytest.approx(tokens, abs=len(grain.parents))
    if by == "shards":
        assert parts.select("domain", "shard").n_unique() == len(grain.parents)


def test_clusters_are_those_of_the_text_not_of_the_shards(folder, tmp_path):
    """The same samples in another order and other shards, one of them twice."""
    run = Run(folder / "run")
    moved = {}
    for domain, stream in run.streams.items():
        rows = [stream.row(index) for index in range(len(stream))]
        moved[domain] = tmp_path / domain
        write_stream(moved[domain], stream.encodings[0], [*rows[::-1], rows[3]], shard_bytes=1500)
    names = []
    for one in (run, Run(folder / "run", moved)):
        parts = grain_of(one, "clusters", clusters=4).stock.places
        names.append(dict(parts.select("sample_id", "domain").iter_rows()))
    assert names[0] == names[1]
    assert len(set(names[0].values())) == 8


def test_texts_of_two_kinds_are_two_clusters(folder, tmp_path):
    """A domain that is two: pieces of one source file and the same pieces with every token moved."""
    run = Run(folder / "run")
    stream = run.streams["json"]
    rows = []
    for index in range(len(stream)):
        sample = stream[index]
        tokens = (sample.tokens + index % 2 * 17) % int(sample.tokens.max() + 1)
        rows.append({**stream.row(index), "tokens": tokens, "sample_id": content_id(tokens, sample.loss_mask)})
    write_stream(tmp_path / "json", COLUMNS, rows, shard_bytes=4000)
    mixed = run.over({"json": tmp_path / "json", "dataclasses": run.spec.streams["dataclasses"]})
    trained = dict.fromkeys(("json", "dataclasses"), 1000)
    grain = divide(mixed, trained, GrainConfig(by="clusters", clusters=2), seed=0)
    kinds = grain.stock.places.filter(pl.col("domain").str.starts_with("json")).group_by("domain")
    shares = kinds.agg(odd=(pl.col("index") % 2).mean())["odd"].sort().to_list()
    assert shares[0] < 0.2
    assert shares[1] > 0.8


@pytest.mark.slow
@BY
def test_a_selection_by_parts_writes_the_mixture_exactly(folder, by):
    out = selected(folder, grain=GrainConfig(by=by, clusters=2))
    mixture = read_mixture(out / "mixture.yaml")
    served = {}
    for part in filter(lambda name: mixture.domains[name].samples, mixture.domains):
        stream = MdsStream(out / "data" / "mds" / part)
        served[part] = Counter(stream[index].sample_id for index in range(len(stream)))
    assert mixture.tokens == 60 * SEQ_LEN
    assert sum(count.total() for count in served.values()) == 60
    parts = dict(grain_of(Run(folder / "run"), by, clusters=2).stock.places.select("sample_id", "domain").iter_rows())
    assert all(parts[sample_id] == part for part, count in served.items() for sample_id in count)
    assert set(pl.read_parquet(out / "domains.parquet")["domain"]) == set(mixture.domains)


@pytest.mark.parametrize(
    "more", [{"mode": "reweight"}, {"mode": "both"}, {"branch_test": True}, {"pool": "x"}, {"method": "dsir"}]
)
def test_what_parts_cannot_be_used_with_is_refused(folder, more):
    with pytest.raises(ValueError, match="needs mode filter"):
        selected(folder, grain=GrainConfig(by="clusters"), **more)


def test_general_data_and_the_prior_may_be_named_by_domain(folder):
    grain = grain_of(Run(folder / "run"), "clusters", clusters=2)
    config = MixtureConfig(replay_domains=("json",), replay_share=0.3, prior={"json": 3.0, "dataclasses": 1.0})
    fine = mixture_of_parts(config, grain)
    assert set(fine.replay_domains) == {"json.0", "json.1"}
    assert fine.prior["json.0"] + fine.prior["json.1"] == pytest.approx(3.0)
    assert set(fine.prior) == set(grain.parents)
    out = selected(folder, grain=GrainConfig(by="clusters", clusters=2), mixture=config)
    weights = {name: part.weight for name, part in read_mixture(out / "mixture.yaml").domains.items()}
    assert weights["json.0"] + weights["json.1"] >= 0.3 - 1e-9


def test_a_floor_of_a_domain_that_is_divided_names_the_parts(folder):
    with pytest.raises(UserError, match=r"mixture.floors names json; the domains are dataclasses.0"):
        selected(folder, grain=GrainConfig(by="clusters", clusters=2), mixture=MixtureConfig(floors={"json": 0.2}))


@pytest.mark.slow
def test_what_is_made_for_parts_serves_whole_domains_too(folder, tmp_path):
    """One artifact per target: that of the guard is made while the domains are divided."""
    lines = (folder / "target.jsonl").read_text().splitlines()
    (tmp_path / "guard.jsonl").write_text("\n".join(lines[::2]) + "\n")
    given = {"method": "less", "guard": tmp_path / "guard.jsonl", "mixture": MixtureConfig(guard_drop=5.0)}
    fine = selected(folder, grain=GrainConfig(by="clusters", clusters=2), **given)
    plain = selected(folder, **given)
    scores = [pl.read_parquet(out / "scores.parquet") for out in (fine, plain)]
    assert set(scores[1]["domain"]) == {"json", "dataclasses"}
    assert scores[0]["value"].to_list() == scores[1]["value"].to_list()
    assert set(scores[0]["domain"]) == set(read_mixture(fine / "mixture.yaml").domains)


@pytest.mark.slow
def test_parts_that_are_used_up_leave_their_share_to_the_others(folder, tmp_path, caplog):
    """In small shards, so that the training used all of some."""
    moved = {}
    for domain, stream in Run(folder / "run").streams.items():
        moved[domain] = tmp_path / domain
        write_stream(
            moved[domain], stream.encodings[0], [stream.row(index) for index in range(len(stream))], shard_bytes=600
        )
    run = Run(folder / "run", moved)
    used = run.steps.select("sample_ids").explode("sample_ids").unique()["sample_ids"]
    left = run.places.filter(~pl.col("sample_id").is_in(used.implode())).group_by("domain", "shard").len()
    caplog.set_level("INFO")
    shards = ShardsConfig(consume_once=True, drop_fraction=0.0, unvalued="keep")
    general = MixtureConfig(replay_domains=("json", "dataclasses"), replay_share=0.3)
    given = {"grain": GrainConfig(by="shards"), "shards": shards, "mixture": general, "streams": moved}
    out = selected(folder, budget_tokens=10 * SEQ_LEN, **given)
    domains = read_mixture(out / "mixture.yaml").domains
    assert len(domains) == len(left)
    gone = run.places.select("domain", "shard").n_unique() - len(left)
    assert gone > 0
    assert "nothing is left of" in caplog.text
    assert sum(part.prior for part in domains.values()) == pytest.approx(1)


def test_shares_of_parts_that_are_left_out_stay_in_the_domain():
    grain = Grain(stock=None, parents={"a.0": "a", "a.1": "a", "a.2": "a", "b.0": "b"}, trained={})
    shares = grain.without(["a.2"], {"a.0": 1.0, "a.1": 3.0, "a.2": 2.0, "b.0": 6.0})
    assert shares == pytest.approx({"a.0": 1.5, "a.1": 4.5, "b.0": 6.0})


def test_the_least_correlation_for_predictions_is_part_of_a_selection(folder, tmp_path):
    out, given = tmp_path / "out", {"shards": ShardsConfig(unvalued="predict")}
    selected(folder, out=out, **given)
    with pytest.raises(UserError, match="min_rank_correlation"):
        selected(folder, out=out, **given, probe=ProbeConfig(min_rank_correlation=0.9))
