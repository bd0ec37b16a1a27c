"""Schemas of every table that crosses from one folder to another. A column's name carries its unit.

Tokens are `stored_tokens` (padding and masked ones too: what a budget counts) or `predicted_tokens` (what has a loss).
Values are `value_total_nats` (of all tokens of a sample, nats per token of the target), `value_total` (the same for
several targets together, then in deviations) or `value_per_token`. Sign: positive = the sample lowers the target's loss
= it helps.

A producer ends in `SCHEMA.validate(table)`; a reader takes `dy.DataFrame[SCHEMA]`, which mypy holds it to.
"""

from __future__ import annotations

import dataframely as dy
import polars as pl

DOCUMENTS = pl.List(pl.Struct({"id": pl.String, "predicted_tokens": pl.Int64}))
"""Type of the documents in a sample."""
# Where values come from; `candidates` were never trained on.
_SOURCES = "^(early|late|current|candidates)$"
VALUES_NATS = ("value_total_nats", "value_half_a_nats", "value_half_b_nats")
"""Of a sample for one target, and for each half of the target's documents."""
VALUES_TOTAL = ("value_total", "value_half_a", "value_half_b")
"""Of a sample for all targets together."""
VALUES_PER_TOKEN = ("value_per_token", "value_half_a_per_token", "value_half_b_per_token")
"""The same of a predicted token."""


class Catalogue(dy.Schema):
    """Every sample of some streams."""

    domain = dy.String(nullable=False)
    index = dy.Int64(nullable=False, min=0)
    """Of the sample in its stream."""
    shard = dy.Int64(nullable=False, min=0)
    sample_id = dy.Int64(nullable=False, min=0)
    """Of its content."""
    stored_tokens = dy.Int64(nullable=False, min=0)
    predicted_tokens = dy.Int64(nullable=False, min=0)
    largest_token_id = dy.Int64(nullable=False)
    novel_ngrams = dy.Int64(nullable=False, min=0)
    """N-grams that occur for the first time in the stream."""
    ngrams = dy.Int64(nullable=False, min=0)


class Samples(dy.Schema):
    """Distinct samples that predict a token, by domain and content id."""

    domain = dy.String(nullable=False)
    index = dy.Int64(nullable=False, min=0)
    shard = dy.Int64(nullable=False, min=0)
    sample_id = dy.Int64(nullable=False, min=0)
    stored_tokens = dy.Int64(nullable=False, min=1)
    predicted_tokens = dy.Int64(nullable=False, min=1)


class SampleUses(dy.Schema):
    """How often samples were trained on."""

    sample_id = dy.Int64(nullable=False)
    uses = dy.Int64(nullable=False, min=1)


class StageUses(SampleUses):
    """The same stage by stage."""

    stage = dy.Int32(nullable=False, min=0)
    """Position among the stages, the first one 0."""


class DomainsSeen(dy.Schema):
    """What all stages trained on of each domain (`seen.parquet`)."""

    domain = dy.String(nullable=False)
    samples = dy.Int64(nullable=False)
    """Distinct ones."""
    seen = dy.Int64(nullable=False)
    """Distinct ones that were trained on."""
    most_uses = dy.Int64(nullable=False)
    """Of one sample."""
    stored_tokens = dy.Int64(nullable=False)
    """Of the distinct samples."""
    seen_tokens = dy.Int64(nullable=False)
    """Stored tokens that were trained on, repeats counted."""
    epochs = dy.Float64(nullable=False)
    """Their ratio."""
    seen_tokens_by_stage = dy.List(dy.Int64(nullable=False), nullable=False)
    """The first stage first."""


class WindowRows(dy.Schema):
    """The samples that a window trained on, one row per sample and step, in the order of training."""

    row = dy.Int64(nullable=False, min=0)
    step = dy.Int64(nullable=False, min=0)
    """Of the stage; of samples at the current state the group that is resampled together."""
    sample_id = dy.Int64(nullable=False, min=0)
    weight = dy.Float32(nullable=False)
    """The sample's share c_z of its step's loss."""
    predicted_tokens = dy.Int64(nullable=False, min=0)
    stored_tokens = dy.Int64(nullable=False, min=1)
    source = dy.String(nullable=False)
    """early, late, current or candidates; `curate.verify` has windows of other names too."""
    horizon = dy.String(nullable=False)
    """State (evaluation checkpoint) that the target's loss is read at."""
    domain = dy.String(nullable=False)
    index = dy.Int64(nullable=False, min=0)
    shard = dy.Int64(nullable=False, min=0)
    documents = dy.List(
        dy.Struct({"id": dy.String(nullable=True), "predicted_tokens": dy.Int64(nullable=True)}), nullable=False
    )
    """Whose tokens the sample holds."""


class MeasuredValues(WindowRows):
    """Values of measured samples, what scores are rolled up from: one row per sample, step, source and target."""

    target = dy.String(nullable=False)
    value_total_nats = dy.Float64(nullable=False)
    value_half_a_nats = dy.Float64(nullable=False)
    value_half_b_nats = dy.Float64(nullable=False)


class Scores(dy.Schema):
    """The same without documents (`scores.parquet`)."""

    row = dy.Int64(nullable=False, min=0)
    step = dy.Int64(nullable=False, min=0)
    sample_id = dy.Int64(nullable=False, min=0)
    weight = dy.Float32(nullable=False)
    predicted_tokens = dy.Int64(nullable=False, min=0)
    stored_tokens = dy.Int64(nullable=False, min=1)
    source = dy.String(nullable=False, regex=_SOURCES)
    horizon = dy.String(nullable=False)
    domain = dy.String(nullable=False)
    index = dy.Int64(nullable=False, min=0)
    shard = dy.Int64(nullable=False, min=0)
    target = dy.String(nullable=False)
    value_total_nats = dy.Float64(nullable=False)
    value_half_a_nats = dy.Float64(nullable=False)
    value_half_b_nats = dy.Float64(nullable=False)


class DrawnSamples(Samples):
    """The samples of every domain that are measured at the current state."""

    step = dy.Int64(nullable=False, min=0)
    """The group that is resampled together."""


class IndexedSamples(Samples):
    """Samples that a search of the value index found, best first."""

    product = dy.Float64(nullable=False)
    """Inner product of the row with what was asked for: value per token, before `row_values` calibrates it."""


class RowTrust(dy.Schema):
    """How well rows of the value index give a domain's exact values (`trust.parquet`), see `influence.row_values`."""

    source = dy.String(nullable=False, regex=_SOURCES)
    target = dy.String(nullable=False)
    predictors = dy.String(nullable=False, regex="^(rows|rows and n-grams)$")
    """rows: as domains are scored for each target; rows and n-grams: as samples are chosen for all targets together."""
    domain = dy.String(nullable=False)
    samples = dy.Int64(nullable=False)
    measured = dy.Int64(nullable=False)
    """Exactly, of those that the space was not fitted on."""
    spearman = dy.Float64(nullable=True)
    """Of what they say with exact values; null where too few were measured, or they do not differ."""
    low = dy.Float64(nullable=True)
    high = dy.Float64(nullable=True)
    share_held = dy.Float64(nullable=True)
    """Of the mean square of exact values; what is missing lies where the space has no numbers."""
    used = dy.Bool(nullable=False)


class FoundSamples(dy.Schema):
    """The samples of most and of least value for a target (`samples.parquet` of a search)."""

    source = dy.String(nullable=False, regex=_SOURCES)
    target = dy.String(nullable=False)
    end = dy.String(nullable=False, regex="^(most|least)$")
    rank = dy.Int64(nullable=False, min=1)
    """Within its end, 1 the farthest out."""
    domain = dy.String(nullable=False)
    index = dy.Int64(nullable=False, min=0)
    sample_id = dy.Int64(nullable=False, min=0)
    predicted_tokens = dy.Int64(nullable=False, min=1)
    value_per_token = dy.Float64(nullable=False)
    """Nats per token of the target, for each predicted token of the sample."""
    by = dy.String(nullable=False, regex="^(measured|row|domain mean)$")
    """measured exactly; row: by its row and its domain's line; domain mean: of the measured samples, where rows are not
    trusted."""
    product = dy.Float64(nullable=False)
    """Of its row with what the target asks for."""
    text = dy.String(nullable=False)


class IndexedDomains(dy.Schema):
    """Value of each domain for a target by the value index (`domains.parquet` of a search)."""

    source = dy.String(nullable=False, regex=_SOURCES)
    target = dy.String(nullable=False)
    domain = dy.String(nullable=False)
    samples = dy.Int64(nullable=False)
    value_per_token = dy.Float64(nullable=False)
    """Nats per token of the target."""
    low = dy.Float64(nullable=True)
    high = dy.Float64(nullable=True)
    """95 % interval, of the regression estimator or of the mean; null where too few were measured."""
    by = dy.String(nullable=False, regex="^(rows|measured samples)$")
    """All rows of the domain, or the measured samples alone where rows are not trusted."""


class SampleValues(dy.Schema):
    """What samples are chosen by: one row per sample and use, for all targets together (`stats.deviation`)."""

    source = dy.String(nullable=False, regex=_SOURCES)
    target = dy.String(nullable=False)
    """The main one, by whose name all of them go."""
    domain = dy.String(nullable=False)
    index = dy.Int64(nullable=False, min=0)
    sample_id = dy.Int64(nullable=False, min=0)
    predicted_tokens = dy.Int64(nullable=False, min=0)
    value_total = dy.Float64(nullable=False)
    value_half_a = dy.Float64(nullable=False)
    """Of the main target's halves; the whole value where halves are not told apart."""
    value_half_b = dy.Float64(nullable=False)


class PredictedValues(dy.Schema):
    """Value of every sample: measured, predicted from its n-grams, or the mean of its domain."""

    domain = dy.String(nullable=False)
    sample_id = dy.Int64(nullable=False)
    value_per_token = dy.Float64(nullable=False)


class PredictionQuality(dy.Schema):
    """How well predictions rank held-out samples, by domain."""

    domain = dy.String(nullable=False)
    samples = dy.Int64(nullable=False)
    measured = dy.Int64(nullable=False)
    """Those that predictions are made from."""
    spearman = dy.Float64(nullable=True)
    """Of held-out measured samples; null where it is not defined."""
    low = dy.Float64(nullable=True)
    high = dy.Float64(nullable=True)
    used = dy.String(nullable=False, regex="^(predictor|domain mean|measured|too few)$")


class Predicted(PredictionQuality):
    """The same of a selection (`predicted.parquet`)."""

    source = dy.String(nullable=False, regex=_SOURCES)
    """Whose values they are."""
    also_measured = dy.Int64(nullable=True)
    """Samples measured beside `measured`, the most promising ones; null where a window's values are predicted from."""
    by_row = dy.Int64(nullable=True)
    """Samples that their row of the value index values instead of a prediction; null likewise."""


class NgramRatios(dy.Schema):
    """N-gram log-likelihood ratios of samples, for all targets together, in deviations."""

    domain = dy.String(nullable=False)
    sample_id = dy.Int64(nullable=False)
    ngram_ratio = dy.Float64(nullable=False)


class DrawKeys(dy.Schema):
    """By which a method draws samples: the k samples of largest key are a draw of k."""

    domain = dy.String(nullable=False)
    index = dy.Int64(nullable=False)
    sample_id = dy.Int64(nullable=False)
    stored_tokens = dy.Int64(nullable=False)
    key = dy.Float64(nullable=False)


class ValueScores(dy.Schema):
    """Scores of domains by source and target from values alone, see `domains.domain`."""

    source = dy.String(nullable=False, regex=_SOURCES)
    target = dy.String(nullable=False)
    domain = dy.String(nullable=False)
    prior = dy.Float64(nullable=False)
    """Share of what was trained on, or of the candidates."""
    novel_share = dy.Float64(nullable=False)
    """Share of novel n-grams in the domain's stream."""
    samples = dy.Int64(nullable=False)
    """Distinct ones that were measured."""
    predicted_tokens = dy.Int64(nullable=False)
    """Of them, each use counted."""
    value_per_token = dy.Float64(nullable=True)
    se = dy.Float64(nullable=True)
    low = dy.Float64(nullable=True)
    high = dy.Float64(nullable=True)
    score = dy.Float64(nullable=False)
    """Deviations of a sample above average."""
    score_se = dy.Float64(nullable=True)
    score_low = dy.Float64(nullable=True)
    score_high = dy.Float64(nullable=True)
    shrunk = dy.Float64(nullable=False)
    """The score shrunk by its error: what weights are made from."""


class DomainScores(ValueScores):
    """The same with what n-grams say (`domains.parquet`), see `domains.ngram_scores`."""

    value_score = dy.Float64(nullable=False)
    """Of values alone."""
    ngram_ratio = dy.Float64(nullable=True)
    """Of n-grams alone, in deviations; null where they have no share."""


class ShardScores(dy.Schema):
    """Value of each shard (`shards.parquet`)."""

    source = dy.String(nullable=False, regex=_SOURCES)
    target = dy.String(nullable=False)
    domain = dy.String(nullable=False)
    shard = dy.Int64(nullable=False)
    samples = dy.Int64(nullable=False)
    predicted_tokens = dy.Int64(nullable=False)
    value_total_nats = dy.Float64(nullable=False)
    value_per_token = dy.Float64(nullable=True)


class DocumentValues(dy.Schema):
    """Value of each document (`documents.parquet`)."""

    source = dy.String(nullable=False, regex=_SOURCES)
    target = dy.String(nullable=False)
    domain = dy.String(nullable=False)
    document = dy.String(nullable=False)
    samples = dy.Int64(nullable=False)
    predicted_tokens = dy.Int64(nullable=False)
    value_total_nats = dy.Float64(nullable=False)
    value_per_token = dy.Float64(nullable=False)


class ShardTests(dy.Schema):
    """Whether the shards of a domain differ in value (`between_shards.parquet`)."""

    source = dy.String(nullable=False, regex=_SOURCES)
    target = dy.String(nullable=False)
    domain = dy.String(nullable=False)
    shards = dy.Int64(nullable=False)
    samples = dy.Int64(nullable=False)
    share_between = dy.Float64(nullable=True)
    p_value = dy.Float64(nullable=True)
    verdict = dy.String(nullable=False)


class Reliability(dy.Schema):
    """Agreement of the two halves of a target (`reliability.parquet`)."""

    source = dy.String(nullable=False, regex=_SOURCES)
    target = dy.String(nullable=False)
    ranking = dy.String(nullable=False)
    samples = dy.Int64(nullable=False)
    spearman = dy.Float64(nullable=True)
    low = dy.Float64(nullable=True)
    high = dy.Float64(nullable=True)
    reliability = dy.Float64(nullable=True)
    reliability_low = dy.Float64(nullable=True)
    reliability_high = dy.Float64(nullable=True)


class LengthBias(dy.Schema):
    """Rank correlation of a sample's value with its length inside domains (`length_bias.parquet`)."""

    source = dy.String(nullable=False, regex=_SOURCES)
    target = dy.String(nullable=False)
    samples = dy.Int64(nullable=False)
    spearman = dy.Float64(nullable=True)
    low = dy.Float64(nullable=True)
    high = dy.Float64(nullable=True)


class SamplePool(dy.Schema):
    """Every sample that the stage can draw, and whether it may be used."""

    domain = dy.String(nullable=False)
    index = dy.Int64(nullable=False)
    sample_id = dy.Int64(nullable=False)
    stored_tokens = dy.Int64(nullable=False)
    value_per_token = dy.Float64(nullable=True)
    """For all targets together, over all uses: nats for one target, in deviations for several or with retained text;
    null where neither measured nor predicted."""
    value_half_a_per_token = dy.Float64(nullable=True)
    value_half_b_per_token = dy.Float64(nullable=True)
    ngram_ratio = dy.Float64(nullable=True)
    uses_so_far = dy.Int64(nullable=False)
    """Times it was trained on; of a text with copies all uses stand in the first row."""
    reason = dy.String(nullable=True)
    """Why it is not used: seen, contamination, near_duplicate, low_value, not_sampled; null: it is kept."""
    detail = dy.String(nullable=True)
    kept = dy.Bool(nullable=False)


class RankedPool(SamplePool):
    """The same with what samples are drawn by."""

    key = dy.Float64(nullable=False, allow_inf=True)
    """-inf where n-grams have a share and the sample has no ratio: it was seen, or predicts no token."""


class PlannedUses(dy.Schema):
    """How often each sample is written."""

    domain = dy.String(nullable=False)
    index = dy.Int64(nullable=False)
    stored_tokens = dy.Int64(nullable=False)
    uses = dy.Int64(nullable=False, min=1)


class DroppedSamples(dy.Schema):
    """Why samples are not written (`data/mds/dropped.parquet`)."""

    domain = dy.String(nullable=False)
    index = dy.Int64(nullable=False)
    sample_id = dy.Int64(nullable=False)
    reason = dy.String(nullable=False)
    detail = dy.String(nullable=True)
    value_per_token = dy.Float64(nullable=True)
    """For all targets together: nats for one target, in deviations for several or with retained text."""


class Contamination(dy.Schema):
    """Samples that share text with held-out documents (`contamination.parquet`)."""

    domain = dy.String(nullable=False)
    index = dy.Int64(nullable=False)
    sample_id = dy.Int64(nullable=False)
    file = dy.String(nullable=False)
    id = dy.String(nullable=False)
    """Of the document."""
    shared = dy.Int64(nullable=False)
    """N-grams in common."""
    of_sample = dy.Float64(nullable=False)
    of_document = dy.Float64(nullable=False)
    removed = dy.Bool(nullable=False)


class Costs(dy.Schema):
    """What each phase cost (`costs.parquet`)."""

    phase = dy.String(nullable=False)
    passes = dy.Float64(nullable=False)
    """Forward+backward passes of a training batch."""
    seconds = dy.Float64(nullable=True)
    bytes = dy.Int64(nullable=True)
    note = dy.String(nullable=False)
