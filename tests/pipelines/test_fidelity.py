"""The fidelity bench, every part of it, on a tiny model and real source text."""

import json
import subprocess
from pathlib import Path

import pytest

from curate.core.errors import UserError
from curate.evaluation.draw import DrawConfig
from pipelines.fidelity.__main__ import bench, show, table
from pipelines.fidelity.config import BenchConfig
from tests.pipelines.bench_data import write_bench_data

ROOT = Path(__file__).parents[2]
ESTIMATORS = {
    "grad-dot", "tracin", "less", "dvemb", "dvemb-adam", "adjoint", "adjoint-own-step",
    "adjoint-own-embedding", "adjoint-r8", "adjoint-r32", "adjoint-r32-heldout", "adjoint-r32-foreign",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fidelity")
    write_bench_data(folder)
    return BenchConfig(
        folder=folder / "out", corpus=folder / "corpus", foreign=("inspect",), targets=("ast", "inspect"), seeds=(0,),
        model=folder / "model.json", vocab_size=300, steps=30, window_steps=5, batch_size=4, seq_len=16,
        target_documents=4, excerpt_characters=60, anchors_per_domain=2, lr=3e-3, anchors_at_stage_end=False,
        levers=False,
        draw=DrawConfig(pairs=8, pairs_per_step=4, groups=4, repeats=1, part_pairs=1, parts=(0.5,)),
    )  # fmt: skip


@pytest.mark.slow
def test_every_estimator_gets_rows_for_every_window_horizon_and_target(config):
    result = bench(config)
    rows = result["rows"]
    assert {row["estimator"] for row in rows} == ESTIMATORS
    cells = {(row["window"], row["horizon"], row["target"]) for row in rows if row["estimator"] == "adjoint"}
    assert len(cells) == 3 * 2 * 3
    anchored = {(row["window"], row["horizon"]) for row in rows if row["estimator"] == "adjoint-r32-heldout"}
    assert len(anchored) == 4
    lines = table(rows)
    printed: list[str] = []
    show(lines, printed.append)
    assert any(line.startswith("adjoint-own-step") for line in printed)
    best = {(line["estimator"], line["window"], line["horizon"]): line["spearman"] for line in lines}
    assert best["adjoint-own-step", "late", "stage_end"] > 0.9
    assert best["adjoint", "late", "stage_end"] > best["grad-dot", "late", "stage_end"]
    own, anchored = (best[name, "late", "window_end"] for name in ("adjoint-own-step", "adjoint-r32"))
    assert anchored == pytest.approx(own, abs=0.1)
    seed = config.folder / "seed-0"
    (rows_file,) = seed.glob("rows-*.json")
    rows_file.unlink()
    (values,) = seed.glob("values-*")
    for name in ("targets-exact-early-early.npz", "targets-exact-stage-bridge-5.npz"):
        (values / name).unlink()
    assert not list(values.glob("*.safetensors"))
    with pytest.raises(UserError, match="lacks a part"):
        bench(config)


def test_a_corpus_without_a_domain_of_the_config_is_refused(config):
    with pytest.raises(UserError, match=r"has no poetry.jsonl"):
        bench(config.model_copy(update={"targets": ("poetry",), "folder": config.folder / "other"}))


@pytest.mark.slow
@pytest.mark.timeout(1500)  # three minutes on an idle core
def test_the_small_bench_as_the_readme_starts_it(config, tmp_path):
    """1.1M parameters, BPE 2048, every estimator but the levers, reruns included."""
    options = {"folder": tmp_path, "corpus": config.corpus, "foreign": '["inspect"]', "targets": '["ast", "inspect"]'}
    command = [ROOT / "scripts" / "bench_fidelity", "--small", "--out", tmp_path / "rows.json"]
    for name, value in options.items():
        command += [f"--{name}", value]
    found = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["estimator"] for row in rows} == ESTIMATORS
    late = [row for row in rows if row["estimator"] == "adjoint-own-step" and row["window"] == "late"]
    assert {row["target"] for row in late} == {"ast", "inspect", "general"}
    assert all(row["spearman"] > 0.8 for row in late)
    assert (tmp_path / "rows.html").exists()
    assert "adjoint-own-step" in found.stdout
