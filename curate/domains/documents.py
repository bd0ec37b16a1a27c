"""Document values: a packed sample's value divided among the documents whose tokens it holds."""

import dataframely as dy
import polars as pl

from curate.stats.sums import row_sum
from curate.tables import DocumentValues, MeasuredValues


def document_values(values: dy.DataFrame[MeasuredValues]) -> dy.DataFrame[DocumentValues]:
    """Sum, for each document, its share of the samples that it is part of.

    A document's share of a sample's value is its predicted tokens over the sample's predicted tokens. The estimators
    value a whole sequence; this share is a convention, exact only where a sample's tokens are worth the same.

    Args:
        values: of measured samples.

    Returns:
        One row per (source, target, domain, document), sorted so: `samples` (rows that hold it), `predicted_tokens`
        (each use counted), `value_total_nats`, `value_per_token`.
    """
    spans = (
        values.filter(pl.col("predicted_tokens") > 0)
        .select(
            "source", "target", "domain", pl.col("value_total_nats") / pl.col("predicted_tokens"), pl.col("documents")
        )
        .explode("documents", empty_as_null=False)  # a sample without documents has no row, instead of one of null
        .unnest("documents")
        .filter(pl.col("predicted_tokens") > 0)
    )
    rolled = (
        spans.group_by("source", "target", "domain", pl.col("id").alias("document"))
        .agg(
            samples=pl.len().cast(pl.Int64),
            predicted_tokens=pl.col("predicted_tokens").sum(),
            value_total_nats=row_sum(pl.col("value_total_nats") * pl.col("predicted_tokens")),
        )
        .with_columns(value_per_token=pl.col("value_total_nats") / pl.col("predicted_tokens"))
        .sort("source", "target", "domain", "document")
    )
    return DocumentValues.validate(rolled)
