"""`scores.parquet`: values of measured samples, checked when written and read."""

from pathlib import Path

import dataframely as dy
import polars as pl

from curate.core.arrays import write_table
from curate.core.artifacts import checked
from curate.core.errors import UserError
from curate.tables import Scores


def write_scores(path: Path, values: pl.DataFrame) -> None:
    """Write measured values atomically; columns that are not in `Scores` (documents) are left out.

    Raises:
        UserError: a column is missing, of another type, null, or not finite (the model diverged).
    """
    write_table(path, _validated(values, "the values"))


def read_scores(path: Path) -> dy.DataFrame[Scores]:
    """Read `scores.parquet`.

    Raises:
        UserError: it is missing, truncated, or does not hold the columns of `Scores`.
    """
    try:
        values = pl.read_parquet(checked(path), glob=False)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; `python -m curate.select` writes it") from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:  # it panics on some damage
        raise UserError(
            f"{path} is not a readable parquet file ({str(error).splitlines()[0]}); delete it and select again"
        ) from None
    return _validated(values, f"the rows of {path}")


def _validated(values: pl.DataFrame, name: str) -> dy.DataFrame[Scores]:
    missing = [column for column in Scores.column_names() if column not in values.columns]
    if missing:
        raise UserError(f"{name} lack the columns {', '.join(missing)}; `python -m curate.select` writes them")
    try:
        return Scores.validate(values.select(Scores.column_names()))
    except (dy.exc.ValidationError, dy.exc.SchemaError) as error:
        # the first paragraph is enough for one sentence
        reason = " ".join(str(error).partition("\n\n")[0].split())
        raise UserError(f"{name} do not fit the columns of scores.parquet: {reason}") from None
