"""Values of candidates on a tiny run: known by content, continued where they were interrupted."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from polars.testing import assert_frame_equal

from curate.core.errors import UserError
from curate.data.mds import COLUMNS, MdsStream, write_stream
from curate.influence.current import NextStepOptions, measure_samples, value_next_step
from curate.training.run import Run
from curate.training.samples import usable_samples
from curate.training.source import SampleSource
from curate.training.target import load_target
from tests.influence.predictions import predict_samples
from tests.tiny import SEQ_LEN, TinyLM

OPTIONS = NextStepOptions(per_domain=20)
WEIGHTS = {"target": 1.0}
BY_CONTENT = [
    "target",
    "domain",
    "sample_id",
    "step",
    "predicted_tokens",
    "stored_tokens",
    "weight",
    "documents",
    "value_total_nats",
]


@pytest.fixture(scope="module")
def run(folder):
    return Run(folder / "run")


@pytest.fixture(scope="module")
def target(folder, run):
    return load_target(folder / "target.jsonl", run.spec, 100)


@pytest.fixture(scope="module")
def candidates(run, tmp_path_factory):
    """The samples that the run never saw."""
    where = tmp_path_factory.mktemp("new")
    seen = set(run.steps["sample_ids"].explode())
    for domain, stream in run.streams.items():
        rows = [stream.row(at) for at in range(len(stream)) if stream[at].sample_id not in seen]
        write_stream(where / domain, COLUMNS, rows, shard_bytes=4000)
    return source_of(run, where)


def source_of(run, folder):
    return SampleSource(run.folder, {domain: folder / domain for domain in run.streams}, run.spec.columns)


def valued(run, source, target):
    """The measured part, all that is measured beside it, and what is predicted of every sample."""
    samples = usable_samples(source.unique_samples)
    part = value_next_step(run, source, samples, [target], OPTIONS, "candidates")
    measured = measure_samples(run, source, samples, part, [target], WEIGHTS, OPTIONS)
    return part, measured, predict_samples(source, samples, part, WEIGHTS, 0)


def files_of(*made):
    """Names and bytes of what was measured."""
    paths = [path for one in made for path in sorted(one.folder.glob("*")) if path.suffix in (".npz", ".parquet")]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths}


def test_candidates_are_measured_and_predicted_as_the_runs_own_samples_are(run, candidates, target):
    part, measured, (every, quality) = valued(run, candidates, target)
    inside = usable_samples(run.unique_samples).join(candidates.unique_samples, on="sample_id", how="semi")
    own = value_next_step(run, run.source, inside, [target], OPTIONS)
    assert set(part.values["source"]) == {"candidates"}
    np.testing.assert_allclose(part.values["value_total_nats"], own.values["value_total_nats"], rtol=1e-6)
    samples = usable_samples(candidates.unique_samples)
    assert measured.values["sample_id"].to_list() == every["sample_id"].to_list() == samples["sample_id"].to_list()
    assert quality["measured"].to_list() == [20, 20]
    assert np.isfinite(every["value_per_token"].to_numpy()).all()


def test_candidates_of_few_samples_are_measured_whole(run, candidates, target):
    samples = usable_samples(candidates.unique_samples)
    part = value_next_step(run, candidates, samples, [target], NextStepOptions(per_domain=1000), "candidates")
    every, quality = predict_samples(candidates, samples, part, WEIGHTS, 0)
    assert set(quality["used"]) == {"measured"}
    np.testing.assert_allclose(
        every["value_per_token"], part.values["value_total_nats"] / part.values["predicted_tokens"], rtol=1e-12
    )


def test_resharding_changes_no_byte(run, candidates, target, tmp_path):
    """Not even a second computation is needed: values are known by content."""
    part, measured, (every, quality) = valued(run, candidates, target)
    before = files_of(part, measured)
    for domain, folder in candidates.folders.items():
        stream = MdsStream(folder)
        order = np.random.default_rng(0).permutation(len(stream)).tolist()
        write_stream(tmp_path / domain, COLUMNS, [stream.row(at) for at in order], shard_bytes=2500)
    moved = source_of(run, tmp_path)
    assert valued(run, moved, target)[0].folder == part.folder
    for made in (part, measured):
        shutil.rmtree(made.folder)
    part_again, measured_again, (every_again, quality_again) = valued(run, moved, target)
    assert files_of(part_again, measured_again) == before
    assert_frame_equal(part_again.values.select(BY_CONTENT), part.values.select(BY_CONTENT))
    assert part_again.values["index"].to_list() != part.values["index"].to_list()
    assert_frame_equal(every_again, every)
    assert_frame_equal(quality_again, quality)


@pytest.mark.parametrize("stop", [1, 3, 5, 9])
def test_an_interrupted_valuation_goes_on_to_the_same_bytes(run, candidates, target, monkeypatch, stop):
    monkeypatch.setattr("curate.influence.extrapolate._BLOCK", 13)
    for made in valued(run, candidates, target)[:2]:
        shutil.rmtree(made.folder)
    wanted = files_of(*valued(run, candidates, target)[:2])
    for made in valued(run, candidates, target)[:2]:
        shutil.rmtree(made.folder)
    read, calls = SampleSource.read_batches, []

    def interrupted(source, samples, size):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return read(source, samples, size)

    with monkeypatch.context() as patch:
        patch.setattr(SampleSource, "read_batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            valued(run, candidates, target)
    done = len(list(run.folder.glob("influence/*/scratch/*.npz")))
    part, measured, _ = valued(run, candidates, target)
    assert files_of(part, measured) == wanted
    assert done == {1: 0, 3: 2, 5: 0, 9: 3}[stop]  # blocks of 13 samples: four of the part, four of the rest
    assert not list(run.folder.glob("influence/*/scratch"))


def test_token_ids_that_the_model_does_not_have_are_refused(run, target, tmp_path, monkeypatch):
    row = dict(run.streams["json"].row(0))
    write_stream(tmp_path / "json", COLUMNS, [{**row, "tokens": np.full(SEQ_LEN, 127, np.int32)}])
    source = SampleSource(run.folder, {"json": tmp_path / "json"}, run.spec.columns)
    monkeypatch.setattr(TinyLM, "config", SimpleNamespace(vocab_size=127), raising=False)
    with pytest.raises(UserError, match=r"\b127\b"):
        value_next_step(run, source, usable_samples(source.unique_samples), [target], OPTIONS, "candidates")
