"""`curate.embed`: what it says about values for a target that was solved into anchors, and its options."""

import json
import logging

import numpy as np
import pytest

from curate.core.config import parse_command
from curate.core.errors import UserError
from curate.embed import EmbedConfig, embed_windows
from curate.embeddings.adjoint_estimator import AdjointConfig, AdjointEstimator
from curate.embeddings.store import plan_job
from curate.training.replay import Replay
from curate.training.run import Run
from curate.training.target import load_targets
from curate.training.windows import PhaseWindow
from tests.tiny import Training, record_tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    record_tiny_run(folder)
    random = np.random.default_rng(0)
    with (folder / "foreign.jsonl").open("w") as file:
        for _ in range(12):
            file.write(json.dumps({"tokens": random.integers(0, 32, 30).tolist()}) + "\n")
    return folder


@pytest.fixture
def run(folder, tmp_path):
    Training(Run(folder / "run").spec.streams).run(tmp_path / "run")
    return Run(tmp_path / "run")


def targets_of(run, folder):
    return load_targets([folder / "foreign.jsonl"], None, run.spec, 100)


def config_of(run, folder, **settings):
    return EmbedConfig(
        **{
            "run": run.folder, "estimator": "anchors", "target": folder / "foreign.jsonl", "window": "early",
            "adjoint": AdjointConfig(anchors_per_domain=1, samples_per_anchor=4), **settings,
        }
    )  # fmt: skip


def test_a_large_residual_is_warned_of_with_the_way_out(folder, run, caplog):
    targets = targets_of(run, folder)
    with caplog.at_level(logging.INFO):
        (embedding,) = embed_windows(config_of(run, folder), run, targets)["early"]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert embedding.residual > 0.5
    assert f"leave {100 * embedding.residual:.0f} % of the target's gradient unexplained" in caplog.text
    job = plan_job(Replay(run), "early", "window_end", targets.main, batch_size=16)
    passes = AdjointEstimator(AdjointConfig()).passes(job)
    (warning,) = [text for text in said if "approximate" in text]
    assert f"--estimator adjoint), which would cost about {passes:.0f} forward+backward passes" in warning


def test_exact_values_are_not_doubted(folder, run, caplog):
    with caplog.at_level(logging.INFO):
        config = config_of(run, folder, estimator="adjoint")
        (embedding,) = embed_windows(config, run, targets_of(run, folder))["early"]
    assert embedding.residual is None
    assert "unexplained" not in caplog.text


def test_a_horizon_is_a_name_or_a_step():
    for text, wanted in (("stage_end", "stage_end"), ("350", 350)):
        assert parse_command(EmbedConfig, "embed", "", ["--window", "late", "--horizon", text]).horizon == wanted
    with pytest.raises(UserError, match="horizon"):
        parse_command(EmbedConfig, "embed", "", ["--window", "late", "--horizon", "soon"])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("target", "t.jsonl"), ("retain", "r.jsonl"), ("more_targets.other", 1), ("windows", "auto"), ("horizon", 3),
        ("window_steps", 3), ("estimator", "dvemb"), ("adjoint.hessian", "difference"), ("dvemb.width", 3),
        ("min_target_tokens", 3), ("index.factory", "Flat"),
    ],
)  # fmt: skip
def test_what_is_of_windows_is_refused_without_one(flag, value):
    with pytest.raises(UserError, match=rf"\b{flag.partition('.')[0]}\b.*--window"):
        parse_command(EmbedConfig, "embed", "", [f"--{flag}={value}"])
    parse_command(EmbedConfig, "embed", "", [f"--{flag}={value}", "--window", "both"])


def test_candidates_are_refused_with_a_window():
    arguments = ["--candidates", "data", "--streams.web", "x", "--tokenizer", "t.json", "--device", "cuda"]
    assert parse_command(EmbedConfig, "embed", "", [*arguments, "--tolerance", "1"]).window is None
    with pytest.raises(UserError, match="candidates"):
        parse_command(EmbedConfig, "embed", "", [*arguments, "--window", "late"])


def test_windows_by_evidence_are_valued_from_the_snapshot_before_them(folder, run, caplog, monkeypatch):
    found = {"early": PhaseWindow(start=3, stop=5, changes=5, line="early window: why")}
    monkeypatch.setattr("curate.training.windows.run_windows", lambda run, value_curve: found)
    config = config_of(run, folder, estimator="adjoint", windows="auto")
    with caplog.at_level(logging.INFO):
        (embedding,) = embed_windows(config, run, targets_of(run, folder))["early"]
    assert embedding.rows["step"].unique().sort().to_list() == [3, 4]
    said = caplog.text
    assert said.index("early window: why") < said.index("steps 3 to 5") < said.index("(1 of them to replay")
