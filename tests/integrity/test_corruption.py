"""Every file that a command reads, damaged in every way: told in a sentence that names it, or made again to the bit.

In the whole tests a part of the table, drawn by a seed; all of it with `-m soak`.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from curate.core.artifacts import SUMS
from curate.training.run import Run
from tests.integrity import arena
from tests.integrity.arena import STEPS, Outcome, call, contents, link_copy

pytestmark = pytest.mark.slow
DAMAGES = ("cut", "empty", "deleted", "another", "begin", "middle", "end", "flip-1", "flip-2")
ONE, TWO = "plan/one/run", "plan/two/run"
SELECTED, OTHER = "plan/one/selection", "plan/two/selection"


def select_again(work: Path) -> Outcome:
    from curate.select import main

    return call(main, "--config", work / "select-0.yaml")


def embed(work: Path) -> Outcome:
    from curate.embed import main

    words = ["--min_target_tokens", 100, "--window", "both"]
    return call(main, "--run", work / ONE, "--target", work / "t.jsonl", *words)


def embed_early(work: Path) -> Outcome:
    """Value the early window as seen from the stage's end, with what the late one left there."""
    from curate.embed import main

    words = ["--min_target_tokens", "100", "--window", "early", "--horizon", "stage_end"]
    return call(main, "--run", work / ONE, "--target", work / "t.jsonl", *words)


def index(work: Path) -> Outcome:
    from curate.embed import main

    return call(main, "--run", work / ONE)


def search(work: Path) -> Outcome:
    from curate.search import main

    return call(main, *arena.search_words(work))


def scheduled(work: Path) -> Outcome:
    from curate.schedule import main

    return call(main, "--plan", work / "stop.yaml", "--once")


def dry_run(work: Path) -> Outcome:
    from curate.schedule import main

    return call(main, "--plan", work / "plan.yaml", "--dry_run")


def ledger(work: Path) -> Outcome:
    from curate.seen import main

    return call(main, "--run", work / TWO)


def report(work: Path) -> Outcome:
    from curate.report.__main__ import main

    return call(main, "--run", work / ONE, "--select", work / SELECTED)


def prepare_again(work: Path) -> Outcome:
    from pipelines.prepare import main

    return call(main, *arena.prepare_words(work, "data", "a", "b"))


def trained(data: str) -> Callable[[Path], Outcome]:
    def train(work: Path) -> Outcome:
        from pipelines.pretrain import main

        words = f"--out {work / 'new'} --data {work / data} --model {work / 'model.json'} --steps {STEPS}".split()
        return call(main, *words, "--init_from", work / ONE / "checkpoint.safetensors", *arena.OPTIONS.split())

    return train


def resume(work: Path) -> Outcome:
    from pipelines.pretrain import main

    return call(main, *arena.half_words(work, "half"))


def train_finished(work: Path) -> Outcome:
    """Train a stage that is complete again."""
    from curate.plans.plan import load_plan
    from pipelines.pretrain import main

    return call(main, *load_plan(work / "plan.yaml").arguments(0)[3:])


@dataclass(frozen=True)
class Artifact:
    """A file, and the command that reads it.

    Attributes:
        file: its place, with wildcards.
        read: the command.
        other: its like of another run, where there is one.
        gone: what is removed before, so that the command comes to read the file.
    """

    file: str
    read: Callable[[Path], Outcome]
    other: str | None = None
    gone: tuple[str, ...] = ()


def _same_of_two(file: str, read: Callable[[Path], Outcome], *gone: str) -> Artifact:
    return Artifact(file, read, file.replace("plan/one", "plan/two"), gone)


LAST = f"snapshots/step-{STEPS:08d}.safetensors"
LATE = f"{ONE}/embeddings/late-*"
TABLES = (
    "documents", "domains", "contamination", "seen", "predicted", "reliability", "scores", "shards", "between_shards"
)  # fmt: skip
REPORTED = ("curve", "domains", "examples", "mixture", "reliability", "shards", "sweep", "targets", "training", "costs")
PARTS = ("steps.parts/*/00000000-", "steps.parts/*/00000003-")
ARTIFACTS = (
    *(_same_of_two(f"{ONE}/{name}", select_again) for name in ("run.json", "steps.parquet", SUMS)),
    *(_same_of_two(f"{ONE}/{name}", dry_run) for name in ("run.json", "steps.parquet")),
    _same_of_two(f"{ONE}/model/config.json", select_again),
    _same_of_two(f"{ONE}/catalogue-*.parquet", select_again),
    *(_same_of_two(f"{ONE}/{name}", ledger) for name in ("run.json", "steps.parquet")),
    *(_same_of_two(f"{ONE}/snapshots/step-{step:08d}.safetensors", embed, f"{ONE}/embeddings") for step in (0, 3, 5)),
    _same_of_two(f"{ONE}/{LAST}", select_again, SELECTED, f"{ONE}/influence"),
    Artifact(f"{TWO}/checkpoint.safetensors", scheduled, f"{ONE}/checkpoint.safetensors"),
    Artifact(f"{TWO}/{LAST}", scheduled, f"{ONE}/{LAST}"),
    _same_of_two(f"{ONE}/checkpoint.safetensors", trained("data")),
    _same_of_two(f"{ONE}/checkpoint.safetensors", train_finished),
    *(
        _same_of_two(f"{LATE}/{name}", select_again, SELECTED)
        for name in (
            "embeddings.npy", "rows.parquet", "target-*.npz", "timings.json", "manifest.json", SUMS,
            "index-*/index.faiss", "index-*/manifest.json", "index-*/curate.sums.json",
        )
    ),
    _same_of_two(f"{LATE}/influence.safetensors", embed_early),
    *(
        _same_of_two(f"{ONE}/influence/current-*/{name}", select_again, SELECTED)
        for name in ("values.parquet", "tokens.npz", "timings.json", "manifest.json", SUMS)
    ),
    _same_of_two(f"{ONE}/influence/current-*/directions.npz", select_again, SELECTED, f"{ONE}/influence/measured-*"),
    *(
        _same_of_two(f"{ONE}/influence/measured-*/{name}", select_again, SELECTED)
        for name in ("values.parquet", "timings.json", "manifest.json", SUMS)
    ),
    *(
        Artifact(f"{ONE}/index/*/{name}", search)
        for name in (
            "space.npz", "groups/*/samples.parquet", "groups/*/sums.npz", f"groups/*/{SUMS}",
            "groups/*/faiss/index.faiss", "groups/*/faiss/manifest.json",
        )
    ),
    *(
        Artifact(f"{ONE}/index/*/{name}", index)
        for name in ("space.npz", "manifest.json", SUMS, "groups/*/manifest.json", "groups/*/samples.parquet")
    ),
    *(_same_of_two(f"{SELECTED}/{name}.parquet", select_again) for name in TABLES),
    *(
        _same_of_two(f"{SELECTED}/{name}", select_again)
        for name in (
            "mixture.yaml", "manifest.json", SUMS, "report.html", "data/schedule.yaml", "data/mds/schedule.yaml",
            "data/mds/index.json", "data/mds/a/index.json", "data/mds/a/shard.00000.mds", "data/mds/tokenizer.json",
        )
    ),
    *(_same_of_two(f"{SELECTED}/report_data/{name}.parquet", report) for name in REPORTED),
    *(_same_of_two(f"{SELECTED}/{name}", report) for name in ("report_data/report.json", "mixture.yaml")),
    Artifact(f"{OTHER}/mixture.yaml", dry_run, f"{SELECTED}/mixture.yaml"),
    Artifact(f"{OTHER}/data/schedule.yaml", scheduled, f"{SELECTED}/data/schedule.yaml"),
    *(
        _same_of_two(f"{SELECTED}/{name}", trained(f"{SELECTED}/data/mds/schedule.yaml"))
        for name in ("data/mds/schedule.yaml", "data/mds/b/index.json", "data/mds/b/shard.00000.mds")
    ),
    Artifact("plain/data/streams.yaml", trained("plain/data/streams.yaml"), f"{SELECTED}/data/schedule.yaml"),
    *(
        Artifact(f"data/{name}", prepare_again, f"other-data/{name}")
        for name in (
            "manifest.json", SUMS, "tokenizer.json", "b/manifest.json", "b/curate.sums.json", "b/index.json",
            "b/shard.00000.mds", "b/shard.00003.mds",
        )
    ),
    *(
        Artifact(f"data/{name}", trained("data"), f"other-data/{name}")
        for name in ("b/index.json", "b/shard.00000.mds", "b/shard.00002.mds")
    ),
    Artifact("data/tokenizer.json", select_again, "other-data/tokenizer.json"),
    Artifact("data/b/shard.00001.mds", embed, "other-data/b/shard.00001.mds", (f"{ONE}/embeddings",)),
    *(Artifact(f"half/{name}", resume, f"other-half/{name}") for name in ("trainer.json", "step-*.safetensors")),
    *(Artifact(f"half/{part}*", resume, f"other-half/{part}*") for part in PARTS),
)  # fmt: skip
CASES = [(artifact, damage) for artifact in ARTIFACTS for damage in DAMAGES if artifact.other or damage != "another"]
QUICK = {select_again, index, search, dry_run, ledger, report, prepare_again, scheduled, resume, train_finished}


def name_of(case: tuple[Artifact, str]) -> str:
    artifact, damage = case
    return f"{artifact.file}-{artifact.read.__name__}-{damage}"


def drawn() -> list[tuple[Artifact, str]]:
    """One damage of every file where that is quick, of one in four where the command has work to do before."""
    random_of = random.Random(0)
    own = {artifact: [case for case in CASES if case[0] == artifact] for artifact in ARTIFACTS}
    quick = [artifact for artifact in ARTIFACTS if artifact.read in QUICK and not artifact.gone]
    slow = [artifact for artifact in ARTIFACTS if artifact not in quick]
    return [random_of.choice(own[artifact]) for artifact in (*quick, *slow[::4])]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> tuple[Path, Path]:
    """Where the commands work, and the same as it was before anything was damaged."""
    work = tmp_path_factory.mktemp("integrity") / "work"
    arena.make(work)
    link_copy(work, work.parent / "pristine")
    return work, work.parent / "pristine"


def put_back(work: Path, kept: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    link_copy(kept, work)


def remove(work: Path, patterns: tuple[str, ...]) -> None:
    for path in [path for pattern in patterns for path in work.glob(pattern)]:
        shutil.rmtree(path)


def damage_file(work: Path, artifact: Artifact, damage: str) -> Path:
    """Replace the file by a damaged one, with a new inode; returns it."""
    (path,) = work.glob(artifact.file)
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "deleted":
        return path
    if damage == "another":
        (other,) = work.glob(artifact.other or "")
        if other.read_bytes() == content:
            pytest.skip("the other run has the same file")
        content = bytearray(other.read_bytes())
    elif damage in ("cut", "empty"):
        content = content[: len(content) * 2 // 3] if damage == "cut" else bytearray()
    else:
        random_of = random.Random(f"{artifact.file} {damage}")
        at = {"begin": 0, "middle": len(content) // 2, "end": len(content) - 1}.get(damage)
        content[random_of.randrange(len(content)) if at is None else at] ^= 1 << random_of.randrange(8)
    path.write_bytes(content)
    return path


REFERENCES: dict[tuple[object, tuple[str, ...]], dict[str, object]] = {}


def reference(work: Path, kept: Path, artifact: Artifact) -> dict[str, object]:
    """What lies there after the command, where nothing is damaged."""
    key = artifact.read, artifact.gone
    if key not in REFERENCES:
        put_back(work, kept)
        remove(work, artifact.gone)
        assert artifact.read(work).status in (0, 4)  # 4: so far as to train, which a stopped plan does not
        REFERENCES[key] = contents(work)
    put_back(work, kept)
    remove(work, artifact.gone)
    return REFERENCES[key]


def hold(pristine: tuple[Path, Path], artifact: Artifact, damage: str) -> str:
    """Damage a file, run the command, and see that it told, or made the file again; says which."""
    work, kept = pristine
    put_back(work, kept)
    remove(work, artifact.gone)
    path = damage_file(work, artifact, damage)
    before = {one: one.stat().st_ino for one in work.rglob("*") if one.is_file()}
    outcome = artifact.read(work)
    if outcome.status != 2:
        assert damage == "deleted", f"accepted (status {outcome.status}): {outcome.said[-500:]}"
        found = contents(work)
        whole = reference(work, kept, artifact)
        assert {name: found[name] for name in found.keys() & whole.keys()} == {
            name: whole[name] for name in found.keys() & whole.keys()
        }
        assert set(whole) - set(found) <= {path.relative_to(work).as_posix()}
        return "made again"
    assert path.name in outcome.error or path.parent.name in outcome.error, outcome.error
    assert len(re.split(r"(?<=[.!?])\s+(?=[A-Z])", outcome.error)) <= 2
    assert "\n" not in outcome.error
    pristine_of = {one: kept / one.relative_to(work) for one in before if one != path}
    lost = [one for one in pristine_of if not one.exists()]
    changed = [
        one for one, old in pristine_of.items()
        if one.exists() and one.stat().st_ino != before[one] and not arena.TIMED.fullmatch(one.name)
        and one.read_bytes() != old.read_bytes()
    ]  # fmt: skip
    assert not lost + changed
    return "told"


@pytest.mark.parametrize("case", drawn(), ids=name_of)
def test_a_damaged_file_is_told_or_made_again(pristine, case):
    hold(pristine, *case)


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_damage_of_every_file(pristine, case):
    hold(pristine, *case)


@pytest.mark.parametrize("damage", ["empty", "deleted"])
def test_a_damaged_plan_is_told(pristine, damage):
    """What is changed in a plan, which the user wrote himself, makes another plan: nothing could tell."""
    hold(pristine, Artifact("plan.yaml", dry_run), damage)


def test_a_whole_plan_is_read_as_it_is(pristine):
    work, kept = pristine
    put_back(work, kept)
    for read in (select_again, dry_run, ledger, report, prepare_again, train_finished):
        assert read(work).status == 0, read.__name__
    assert contents(work) == contents(kept)
    assert Run(work / ONE).steps.height == STEPS
