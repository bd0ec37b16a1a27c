"""Tables have the columns of their schemas: those of the code, and those that a selection leaves on disk."""

import ast
from pathlib import Path

import dataframely as dy
import polars as pl
import pytest

from curate import tables
from curate.selection.config import SelectConfig
from curate.selection.pipeline import select
from curate.training.run import Run
from tests.tiny import SEQ_LEN

CODE = sorted(Path(tables.__file__).parent.rglob("*.py"))
SCHEMAS = {
    name: schema
    for name, schema in vars(tables).items()
    if isinstance(schema, type) and issubclass(schema, dy.Schema) and schema is not dy.Schema
}
FILES = {
    "scores.parquet": tables.Scores,
    "domains.parquet": tables.DomainScores,
    "shards.parquet": tables.ShardScores,
    "documents.parquet": tables.DocumentValues,
    "between_shards.parquet": tables.ShardTests,
    "reliability.parquet": tables.Reliability,
    "length_bias.parquet": tables.LengthBias,
    "seen.parquet": tables.DomainsSeen,
    "contamination.parquet": tables.Contamination,
    "predicted.parquet": tables.Predicted,
    "costs.parquet": tables.Costs,
    "data/mds/dropped.parquet": tables.DroppedSamples,
}
ALWAYS = {"scores.parquet", "domains.parquet", "seen.parquet", "contamination.parquet"}
VALUED = FILES.keys() - {"predicted.parquet", "data/mds/dropped.parquet"}
SELECTIONS = [  # settings, the files that they write, whose values they hold
    ({}, set(FILES), {"current"}),
    ({"values": {"sources": ("early", "late")}, "mode": "both"}, set(FILES), {"early", "late", "current"}),
    ({"mode": "weights"}, VALUED, {"current"}),
    ({"method": "grad-dot"}, set(FILES), {"late"}),
    ({"method": "dsir"}, ALWAYS | {"data/mds/dropped.parquet"}, {"current"}),
    ({"candidates": "data"}, set(FILES), {"candidates"}),
]


def validated():
    """The schemas that some code ends in: the names before `.validate(`."""
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "validate" and isinstance(node.value, ast.Name):
                yield node.value.id


def test_every_schema_is_produced_by_someone():
    assert SCHEMAS.keys() <= set(validated())


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_numbers_of_tokens_and_values_say_which(schema):
    assert not {"tokens", "length", "value", "value_a", "value_b", "window"} & set(schema.column_names())


@pytest.mark.parametrize(("settings", "files", "sources"), SELECTIONS, ids=range(len(SELECTIONS)))
def test_a_selection_leaves_the_tables_of_its_schemas(folder, tmp_path, settings, files, sources):
    given = {"values": {}, **settings}
    if "candidates" in given:
        given["candidates"] = folder / given["candidates"]
    if given.get("method") != "dsir":
        given["output"] = {"wandb": "none"}
    given["values"] = {"min_target_tokens": 100, **given["values"]}
    config = SelectConfig(
        run=folder / "run", target=folder / "target.jsonl", budget_tokens=40 * SEQ_LEN, out=tmp_path / "out", **given
    )
    out = select(config, Run(config.run))
    found = {str(path.relative_to(out)): pl.read_parquet(path) for path in out.rglob("*.parquet")}
    assert {name for name in found if not name.startswith("report_data/")} == files
    for name in files:
        assert found[name].columns == FILES[name].column_names(), name
        FILES[name].validate(found[name])
    held = [set(table["source"]) for table in found.values() if "source" in table.columns]
    assert set().union(*held) == sources
