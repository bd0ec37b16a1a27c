"""The readers that are fuzzed, each with its inputs and its oracle."""

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin

import polars as pl
from hypothesis import strategies as st
from pydantic import BaseModel

from curate.core.artifacts import list_files
from curate.core.config import parse_command
from curate.core.validation import kinds_of
from curate.data.files import DocumentFile, open_reader, read_documents
from curate.data.phases import load_schedule
from curate.mixture.record import Mixture, read_mixture
from curate.plans.plan import load_plan
from curate.reconstruct.description import ReconstructConfig
from curate.reconstruct.records import read_log
from curate.selection.candidates import candidate_streams
from curate.training.run import Run, RunSpec
from curate.training.target import load_target
from pipelines.vocabulary import train_tokenizer
from tests.fuzz import inputs, oracles
from tests.fuzz.corpus import CORPUS
from tests.fuzz.inputs import ANY, SCALAR, TEXT, as_yaml, changed, files, mostly, mutated, tables
from tests.fuzz.outcome import ACCEPTED, REFUSED, FuzzTarget, demand
from tests.test_config import COMMANDS, NEEDED, is_group
from tests.tiny import TASK, record_tiny_run

ROOT = Path(__file__).resolve().parents[2]


def all_targets(folder: Path) -> list[FuzzTarget]:
    """Every reader; `folder` gets the run and the tokenizer that some of them read beside the input."""
    return [*_document_targets(folder), *_dataset_targets(folder), *_yaml_targets(), *_run_targets(folder)]


def seeds(name: str) -> list[bytes]:
    """Inputs of the corpus, to be damaged further."""
    return [data for data, _ in CORPUS[name]]


def _document_targets(folder: Path) -> list[FuzzTarget]:
    tokenizer = folder / "tokenizer.json"
    train_tokenizer(["the cat sat on the mat, and the dog sat on the log"] * 20, 300).save(str(tokenizer))
    spec = RunSpec(
        task=TASK,
        streams={},
        tokenizer=tokenizer,
        seq_len=8,
        steps=1,
        windows={},
        optimizers=[],
        groups=[],
        clip_norm=None,
    )

    def same_rows(rows: Callable[[bytes], list[Any]], data: bytes, documents: Any) -> None:
        oracles.same_documents(rows(data), documents)

    def same_target(data: bytes, target: Any) -> None:
        rows = oracles.rows_of_jsonl(data)
        different = {json.dumps(oracles.document_of(row)) for row in rows}
        demand(2 <= target.documents <= len(different), f"{target.documents} documents of {len(different)}")
        demand(target.tokens >= 10, f"{target.tokens} tokens")
        predicted = sum(int(half.loss_mask[:, 1:].sum()) for half in target.halves)
        demand(predicted == target.tokens, f"{predicted} tokens are predicted, not {target.tokens}")
        for half in target.halves:
            demand(abs(float(half.weights.sum()) - 1) < 1e-5, f"weights sum to {float(half.weights.sum())}")

    rows = ["text", "prompt", "completion", "tokens", "loss_mask", "id"]
    return [
        FuzzTarget(
            name="documents",
            file="d.jsonl",
            read=read_documents,
            oracle=partial(same_rows, oracles.rows_of_jsonl),
            inputs=files(inputs.DOCUMENTS, seeds("documents")),
            corpus=CORPUS["documents"],
        ),
        FuzzTarget(
            name="target",
            file="t.jsonl",
            read=lambda path: load_target(path, spec, 10),
            oracle=same_target,
            inputs=files(inputs.DOCUMENTS, seeds("documents")),
            corpus=CORPUS["target"],
        ),
        FuzzTarget(
            name="parquet",
            file="d.parquet",
            read=read_documents,
            oracle=partial(same_rows, oracles.rows_of_parquet),
            inputs=files(tables(rows), [inputs.parquet(pl.DataFrame({"text": ["a", "b"], "id": ["1", "2"]}))]),
        ),
    ]


def _dataset_targets(folder: Path) -> list[FuzzTarget]:
    """One for each kind of file that a saved dataset has."""
    from datasets import Dataset

    rows = [{"id": "a", "text": "some text"}, {"id": "b", "text": "more text"}, {"id": "c", "text": "x"}]
    saved = folder / "saved"
    Dataset.from_list(rows).save_to_disk(saved)

    def beside(place: Path, whole: bytes, path: Path) -> Any:
        place.write_bytes(path.read_bytes())
        try:
            return read_saved(saved, folder / "cache")
        finally:
            place.write_bytes(whole)

    def oracle(data: bytes, documents: Any) -> None:
        demand(len(documents) == 3, f"{len(documents)} documents")
        for document in documents:
            demand(document.text is not None and len(document.text.encode()) > 0, f"no text in {document}")

    return [
        FuzzTarget(
            name=name,
            file=place.name,
            read=partial(beside, place, place.read_bytes()),
            oracle=oracle,
            inputs=mutated([place.read_bytes()]),
            corpus=((place.read_bytes(), ACCEPTED), (b"", REFUSED)),
            named=saved.name,
        )
        for name, place in (
            ("saved rows", saved / "data-00000-of-00001.arrow"),
            ("saved state", saved / "state.json"),
            ("saved info", saved / "dataset_info.json"),
        )
    ]


def read_saved(saved: Path, cache: Path) -> Any:
    """The documents of a saved dataset."""
    reader = open_reader(DocumentFile(path=saved, name=saved.name), None, "train", cache)
    return reader.read(range(len(reader)))


def value_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Values for a setting: mostly what it may be, sometimes anything."""
    return mostly(_right_value(annotation), ANY)


def _right_value(annotation: Any) -> st.SearchStrategy[Any]:
    choices: list[st.SearchStrategy[Any]] = []
    for kind in kinds_of(annotation):
        origin, inner = get_origin(kind), get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            choices.append(settings_of(kind))
        elif origin is dict:
            choices.append(st.dictionaries(st.sampled_from(["web", "code", "7"]), value_of(inner[1]), max_size=2))
        elif origin in (list, tuple) and (origin is list or inner[-1] is ...):
            choices.append(st.one_of(value_of(inner[0]), st.lists(value_of(inner[0]), max_size=2)))
        elif origin is tuple:
            choices.append(st.tuples(*map(value_of, inner)).map(list))
        elif origin is not None:
            choices.append(st.sampled_from(inner))
        else:
            choices.append(_PLAIN.get(kind, ANY))
    return st.one_of(choices)


_PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(1, 60),
    float: st.sampled_from([0.1, 0.5, 1e-3, 1.0]),
    str: st.sampled_from(["x", "late", "a b"]),
    Path: st.sampled_from(["x", "~/y", "data/a", "../b"]),
}


@st.composite
def settings_of(draw: Any, config: type[BaseModel], needed: dict[str, Any] | None = None) -> dict[str, Any]:
    """A mapping of settings: what is needed, a few others, now and then one that there is not."""
    fields = config.model_fields
    names = [name for name, field in fields.items() if field.is_required()]
    names += draw(st.lists(st.sampled_from(list(fields)), max_size=3))
    chosen = {name: draw(value_of(fields[name].annotation)) for name in dict.fromkeys(names)}
    if needed is not None:
        chosen |= {name: value for name, value in needed.items() if draw(st.integers(0, 9))}
    return {**chosen, **({draw(TEXT): 1} if draw(st.integers(0, 19)) == 0 else {})}


def _a_command(data: bytes) -> str:
    first = data.split(b"\n", 1)[0].removeprefix(b"# ").decode("ascii", "replace")
    return first if first in COMMANDS else "curate.select"


def _read_settings(path: Path) -> Any:
    config = COMMANDS[_a_command(path.read_bytes())]
    return parse_command(config, "x", "", ["--config", str(path)])


@st.composite
def _command_files(draw: Any) -> bytes:
    command = draw(st.sampled_from(sorted(COMMANDS)))
    return f"# {command}\n".encode() + as_yaml(draw(settings_of(COMMANDS[command])))


GOOD = st.sampled_from(["train --out {out} --data {data}", "train {steps:05d} {name}", "train '{out}' {{}} \\{"])
BAD = st.sampled_from(
    [
        "train '{lr}'",
        "train {checkpoint} {previous}",
        "",
        " ",
        "train '",
        "{steps!q}",
        "{steps:zz}",
        "{steps:05d}",
        "{steps:99999d}",
        "{}",
        "{0}",
        "{steps.real}",
        "a\0b",
        "{tokens}",
        "{{x}}",
        "{",
        "a \\",
        "''",
        "train {windows}",
        "{out!r:.3}",
    ]
)
TEMPLATES = mostly(GOOD, BAD)
STAGE = st.fixed_dictionaries(
    {"name": mostly(st.sampled_from(["one", "two", "a.b", "c-1"]), TEXT), "steps": mostly(st.integers(1, 9), SCALAR)},
    optional={
        "tokens": mostly(st.sampled_from(["50M", 1000]), SCALAR),
        "train": TEMPLATES,
        "windows": mostly(st.just({"late": [0.5, 1.0]}), ANY),
        "settings": mostly(st.just({"rate": 0.1}), ANY),
        "lr_schedule": mostly(st.just({"lr": 0.1}), ANY),
        "selection": mostly(st.just({"mode": "weights"}), ANY),
    },
)
PLAN = st.fixed_dictionaries(
    {
        "folder": mostly(st.just("p"), TEXT),
        "data": st.just("d"),
        "target": mostly(st.sampled_from(["t.jsonl", "~/t.jsonl"]), TEXT),
        "train": TEMPLATES,
        "stages": mostly(st.lists(STAGE, min_size=1, max_size=3, unique_by=lambda stage: str(stage["name"])), ANY),
    },
    optional={
        "train_first": TEMPLATES,
        "checkpoint": mostly(st.just("c.pt"), st.sampled_from(["../c.pt", "/c.pt"]) | TEXT),
        "selection": mostly(st.just({"mixture": {"schedule": "anneal"}}), st.just({"mixture": "anneal"}) | ANY),
    },
)
AMOUNT = {"choose": mostly(st.integers(1, 9), SCALAR)}
STREAM = st.fixed_dictionaries(
    {"local": mostly(st.sampled_from(["data/a", "data/b", "~/c"]), TEXT), **AMOUNT},
    optional={"split": mostly(st.just("train"), SCALAR)},
)
STREAMS = st.lists(
    mostly(STREAM, st.fixed_dictionaries(AMOUNT, optional={"repeat": inputs.NUMBER, "chose": st.just(3)})),
    min_size=1,
    max_size=3,
    unique_by=lambda stream: str(stream.get("local")),
)


@st.composite
def schedules(draw: Any) -> bytes:
    """Entries that follow each other, mostly."""
    entries, at = [], 0
    for _ in range(draw(st.integers(1, 3))):
        streams = draw(st.lists(STREAM, min_size=1, max_size=2))
        entries.append({"start_sample": draw(mostly(st.just(at), SCALAR)), "streams": streams})
        at += sum(stream["choose"] for stream in streams if type(stream["choose"]) is int)
    return as_yaml(entries)


def _plan_holds(data: bytes, plan: Any) -> None:
    said = oracles.once(data)
    oracles.said_is_meant(said, plan)
    oracles.in_range(plan)
    names = [stage.name for stage in plan.stages]
    demand(len(set(names)) == len(names) > 0, "two stages of one name")
    for index, name in enumerate(names):
        demand(
            name.replace(".", "").replace("-", "").replace("_", "a").isalnum() and name[0] not in ".-", f"name {name!r}"
        )
        words = plan.arguments(index)
        demand(bool(words) and words[0].strip() != "", "a blank command")
        demand(not any("\0" in word or len(word) > 10_000 for word in words), "a word that no program can be given")
        for word in words:
            word.encode()
        demand(".." not in Path(plan.checkpoint).parts, "a checkpoint elsewhere")


def _settings_hold(data: bytes, config: Any) -> None:
    said = oracles.once(data)
    oracles.said_is_meant(said or {}, config)
    oracles.in_range(config)


def _streams_hold(data: bytes, streams: dict[str, Path]) -> None:
    said = oracles.once(data)
    demand(isinstance(said, list) and bool(said), "no list")
    demand(all(isinstance(entry, dict) for entry in said), "an entry that is no mapping")
    demand("/" not in "".join(streams) and len(streams) >= 1, f"domains {list(streams)}")


def _schedule_holds(data: bytes, schedule: Any) -> None:
    if schedule is None:
        return
    said = oracles.once(data)
    at = int(said[0]["start_sample"], 0)
    for entry in said:
        demand(int(entry["start_sample"].replace("_", ""), 0) == at, f"an entry at {entry['start_sample']}, not {at}")
        counts = [int(stream["choose"].replace("_", ""), 0) for stream in entry["streams"]]
        demand(bool(counts) and min(counts) >= 1, f"choose {counts}")
        at += sum(counts)
    demand(
        sum(stream["choose"] for stream in schedule.totals()) == at - schedule.entries[0].start_sample, "other totals"
    )


def _yaml_targets() -> list[FuzzTarget]:
    describe = partial(parse_command, ReconstructConfig, "x", "")
    return [
        FuzzTarget(
            name="plan",
            file="plan.yaml",
            read=load_plan,
            oracle=_plan_holds,
            corpus=CORPUS["plan"],
            inputs=files(PLAN.map(as_yaml), seeds("plan")),
        ),
        FuzzTarget(
            name="description",
            file="description.yaml",
            read=lambda path: describe(["--config", str(path)]),
            oracle=_settings_hold,
            corpus=CORPUS["description"],
            inputs=files(settings_of(ReconstructConfig, NEEDED).map(as_yaml), seeds("description")),
        ),
        FuzzTarget(
            name="settings",
            file="settings.yaml",
            read=_read_settings,
            oracle=_settings_hold,
            corpus=CORPUS["settings"],
            inputs=files(_command_files(), seeds("settings")),
        ),
        FuzzTarget(
            name="streams",
            file="streams.yaml",
            read=candidate_streams,
            oracle=_streams_hold,
            corpus=CORPUS["streams"],
            inputs=files(STREAMS.map(as_yaml), seeds("streams")),
        ),
        FuzzTarget(
            name="schedule",
            file="schedule.yaml",
            read=_read_schedule,
            oracle=_schedule_holds,
            corpus=CORPUS["schedule"],
            inputs=files(schedules(), seeds("schedule")),
        ),
        FuzzTarget(
            name="mixture",
            file="mixture.yaml",
            read=read_mixture,
            oracle=_mixture_holds,
            inputs=settings_of(Mixture).map(as_yaml),
        ),
    ]


def _read_schedule(path: Path) -> Any:
    schedule = load_schedule(path)
    if schedule is not None:
        schedule.totals()
    return schedule


def _mixture_holds(data: bytes, mixture: Any) -> None:
    oracles.said_is_meant(oracles.once(data), mixture)


def _run_targets(folder: Path) -> list[FuzzTarget]:
    run = record_tiny_run(folder)
    run_json = (run.folder / "run.json").read_bytes()
    steps = pl.read_parquet(run.folder / "steps.parquet")
    catalogue = run.catalogue
    path = next(run.folder.glob("catalogue-*.parquet"))
    log = pl.DataFrame({"step": [0, 1, 2], "loss": [2.0, 1.5, 1.25], "lr": [0.1, 0.1, 0.05]})

    def beside(read: Callable[[Run], Any], name: str, whole: bytes, listed: bool, path: Path) -> Any:
        """Put the input into the run, `listed` as if its writer had written it; read; put back what was there."""
        place = run.folder / name
        place.write_bytes(path.read_bytes())
        if listed:
            list_files(run.folder, [place])
        try:
            return read(Run(run.folder))
        finally:
            place.write_bytes(whole)
            list_files(run.folder, [place])

    def same_run(data: bytes, made: Any) -> None:
        said = json.loads(data, object_pairs_hook=oracles.no_key_twice)
        demand(made.spec.steps == int(said["steps"]) and made.spec.seq_len == int(said["seq_len"]), "other sizes")
        demand(made.spec.seq_len > 0 and set(made.spec.streams) == set(said["streams"]), "other streams")

    def same_steps(data: bytes, frame: Any) -> None:
        stored = pl.read_parquet(io.BytesIO(data))
        demand(stored.schema == steps.schema, f"columns {stored.schema}")
        demand(set(range(12)) <= set(stored["step"]), "steps are missing")
        demand(frame.equals(stored.sort("step", "rank", "micro_batch")), "other records")

    def same_catalogue(data: bytes, frame: Any) -> None:
        demand(frame.equals(catalogue), "another catalogue")

    def same_log(data: bytes, frame: Any) -> None:
        stored = pl.read_parquet(io.BytesIO(data))
        demand({"step", "loss"} <= set(stored.columns) and not frame["loss"].is_null().all(), "no losses")

    def target(name: str, place: str, read: Callable[[Run], Any], oracle: Any, whole: bytes, inputs: Any) -> FuzzTarget:
        return FuzzTarget(
            name=name,
            file=place,
            read=partial(beside, read, place, whole, name != "catalogue"),
            oracle=oracle,
            inputs=inputs,
            corpus=((whole, ACCEPTED), (b"", REFUSED)),
        )

    whole = (run.folder / "steps.parquet").read_bytes()
    return [
        target("run", "run.json", lambda run: run, same_run, run_json, mutated([run_json])),
        target("steps", "steps.parquet", lambda run: run.steps, same_steps, whole, changed(steps) | mutated([whole])),
        target(
            "catalogue",
            path.name,
            lambda run: run.catalogue,
            same_catalogue,
            path.read_bytes(),
            changed(catalogue) | mutated([path.read_bytes()]),
        ),
        FuzzTarget(
            name="log",
            file="log.parquet",
            read=_read_log,
            oracle=same_log,
            inputs=changed(log) | mutated([inputs.parquet(log)]) | tables(["step", "loss", "lr"]),
        ),
    ]


def _read_log(path: Path) -> Any:
    config = ReconstructConfig.model_fields["log"].annotation
    assert is_group(config)
    return read_log(config(file=path), 3)
