"""Document values: a packed sample's value divided among the documents whose tokens it holds."""

import polars as pl

from curate.stats.sums import row_sum


def document_values(values: pl.DataFrame) -> pl.DataFrame:
    """Sum, for each document, its share of the samples that it is part of.

    A document's share of a sample's value is its predicted tokens over the sample's predicted tokens. The estimators
    value a whole sequence; this share is a convention, exact only where a sample's tokens are worth the same.

    Args:
        values: columns `source`, `target`, `domain`, `value`, `tokens` and `documents` (list of {id, tokens}).

    Returns:
        One row per (source, target, domain, document), sorted so: `samples` (rows that hold it), `tokens` (predicted,
        each use counted), `value`, `value_per_token`.
    """
    spans = (
        values.filter(pl.col("tokens") > 0)
        .select("source", "target", "domain", pl.col("value") / pl.col("tokens"), pl.col("documents"))
        .explode("documents", empty_as_null=False)
        .unnest("documents")
        .filter(pl.col("tokens") > 0)
    )
    return (
        spans.group_by("source", "target", "domain", pl.col("id").alias("document"))
        .agg(
            samples=pl.len().cast(pl.Int64),
            tokens=pl.col("tokens").sum(),
            value=row_sum(pl.col("value") * pl.col("tokens")),
        )
        .with_columns(value_per_token=pl.col("value") / pl.col("tokens"))
        .sort("source", "target", "domain", "document")
    )
