"""Tables of a schema in which a test says only what it is about."""

from typing import Any

import dataframely as dy
import polars as pl


def fill(schema: type[dy.Schema], table: pl.DataFrame) -> pl.DataFrame:
    """The table with every column of a schema: what it lacks is null where that is allowed, else any constant."""
    missing = {name: column for name, column in schema.columns().items() if name not in table.columns}
    return schema.validate(table.with_columns(**{name: _any(column) for name, column in missing.items()}), cast=True)


def _any(column: dy.Column) -> pl.Expr:
    constant: Any = None if column.nullable else _constant(column)
    return pl.lit(constant, column.dtype)


def _constant(column: dy.Column) -> Any:
    if column.dtype == pl.String:
        return "late" if getattr(column, "regex", None) else "t"
    return [] if column.dtype == pl.List else 1
