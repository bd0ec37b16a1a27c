"""Values from rows: the line against least squares, its mean in a simulation, and where rows are not used."""

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr
from scipy.stats import t as student

from curate.influence.row_values import MIN_RANK_CORRELATION, calibrate
from curate.tables import RowTrust

NAMES = {"source": "current", "target": "t", "predictors": "rows"}
NONE = np.zeros(0, np.int64)


def population(size, seed, noise=0.5, domain="a", first=0):
    """Samples of a domain whose values are about a line of the products; noise depends on the product."""
    random = np.random.default_rng(seed)
    products = random.gamma(2.0, 1.0, size)
    values = 0.3 + 1.7 * products + 0.1 * products**2 + noise * (0.5 + products) * random.standard_normal(size)
    return pl.DataFrame(
        {
            "domain": [domain] * size,
            "sample_id": np.arange(first, first + size),
            "predicted_tokens": random.integers(5, 200, size),
            "value_per_token": values,
            "product": products,
        }
    )


def calibrated(table, fitted=NONE, seed=0, counts=None):
    counts = counts or dict(table.group_by("domain").len().sort("domain").iter_rows())
    return calibrate(table.drop("product"), table["product"].to_numpy()[:, None], fitted, counts, NAMES, seed)


def arrays_of(table):
    return (table[name].to_numpy() for name in ("value_per_token", "product", "predicted_tokens"))


def test_the_line_is_weighted_least_squares():
    table = pl.concat([population(30, 0), population(25, 1, domain="b", first=1000)])
    found = calibrated(table)
    RowTrust.validate(found.trust)
    assert set(found.lines) == {"a", "b"}
    for domain, line in found.lines.items():
        values, products, tokens = arrays_of(table.filter(domain=domain))
        slope, intercept = np.polyfit(products, values, 1, w=np.sqrt(tokens))
        assert (line.intercept, line.slopes[0]) == pytest.approx((intercept, slope))
        design = np.stack([np.ones(len(values)), products], 1) * np.sqrt(tokens)[:, None]
        leverage = np.diag(design @ np.linalg.pinv(design))
        left = tokens * (values - intercept - slope * products) / (1 - leverage)
        error = np.sqrt(len(left) / (len(left) - 2) * (left**2).sum()) / tokens.sum()
        assert line.error == pytest.approx(error)
    # samples are read by the line of their domain
    domains, products = table["domain"].to_numpy(), table["product"].to_numpy()
    wanted = [found.lines[d].intercept + found.lines[d].slopes[0] * x for d, x in zip(domains, products, strict=True)]
    np.testing.assert_allclose(found.values(domains, products[:, None]), wanted)


def test_trust_says_how_ranks_agree_and_what_share_rows_hold():
    table = population(40, 3)
    values, products, tokens = arrays_of(table)
    (row,) = calibrated(table).trust.iter_rows(named=True)
    assert row["spearman"] == pytest.approx(spearmanr(products, values).statistic)
    assert row["low"] < row["spearman"] < row["high"]
    share = 1 - (tokens * (values - products) ** 2).sum() / (tokens * values**2).sum()
    assert row["share_held"] == pytest.approx(share)
    assert (row["samples"], row["measured"], row["used"]) == (40, 40, True)
    assert {name: row[name] for name in NAMES} == NAMES


@pytest.mark.parametrize(("count", "least"), [(12, 0.9), (30, 0.92)])
def test_the_mean_of_a_domain_is_nearly_unbiased_and_its_interval_covers_it(monkeypatch, count, least):
    monkeypatch.setattr("curate.stats.rank_correlation._RESAMPLES", 20)
    whole, draws = population(5000, 4), 500
    values, products, tokens = arrays_of(whole)
    truth, mean_product = np.average(values, weights=tokens), np.average(products, weights=tokens)
    random = np.random.default_rng(5)
    estimates, plain, covered = [], [], []
    for _ in range(draws):
        drawn = whole[np.sort(random.choice(len(whole), count, replace=False))]
        found = calibrated(drawn)
        if "a" not in found.lines:  # rows of so few are not always trusted
            continue
        line = found.lines["a"]
        estimates.append(line.intercept + line.slopes[0] * mean_product)
        covered.append(abs(estimates[-1] - truth) < student.ppf(0.975, count - 2) * line.error)
        some, _, weights = arrays_of(drawn)
        plain.append(np.average(some, weights=weights))
    # far below the error of one draw
    assert abs(np.mean(estimates) - truth) < 0.2 * np.std(estimates)
    assert len(covered) > 0.8 * draws
    assert least < np.mean(covered) < 0.98
    # what rows are for: the mean of the measured samples alone varies more
    assert np.std(estimates) < 0.7 * np.std(plain)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda table: table.with_columns(product=-pl.col("product")),
        lambda table: table.with_columns(product=pl.col("product").shuffle(seed=1)),
        lambda table: table.with_columns(product=pl.lit(1.0)),
        lambda table: table.with_columns(value_per_token=pl.lit(1.0)),
        lambda table: table.head(7),
        lambda table: table.head(0),
    ],
    ids=["reversed", "shuffled", "equal products", "equal values", "seven", "none"],
)
def test_rows_that_rank_badly_or_that_nobody_could_judge_are_not_used(spoil):
    good, bad = population(30, 0), spoil(population(30, 1, domain="b", first=1000))
    found = calibrated(pl.concat([good, bad.select(good.columns)]), counts={"a": 100, "b": 200})
    assert found.trust["used"].to_list() == [True, False]
    assert set(found.lines) == {"a"}
    assert found.trust["samples"].to_list() == [100, 200]
    assert found.trust["measured"].to_list() == [30, len(bad)]
    values = found.values(np.array(["a", "b", "c"]), np.ones((3, 1)))
    assert np.isfinite(values).tolist() == [True, False, False]


def test_a_correlation_that_may_be_chance_is_not_used():
    """Of few samples a high one may be: its interval says so."""
    chance = 0
    for seed in range(40):
        table = population(8, seed, noise=2.0)
        (row,) = calibrated(table).trust.iter_rows(named=True)
        assert row["used"] == (row["spearman"] >= MIN_RANK_CORRELATION and row["low"] > 0)
        chance += row["spearman"] >= MIN_RANK_CORRELATION and not row["used"]
    assert chance > 0


def test_samples_that_the_space_was_fitted_on_never_count():
    table = population(60, 0)
    fitted = table["sample_id"].to_numpy()[::2]
    lie = table.with_columns(
        value_per_token=pl.when(pl.col("sample_id").is_in(fitted.tolist()))
        .then(-1e3 * pl.col("product"))
        .otherwise("value_per_token")
    )
    found, wanted = calibrated(lie, fitted), calibrated(table[1::2], counts={"a": 60})
    assert found.trust.equals(wanted.trust)
    assert found.lines == wanted.lines
    assert found.trust["measured"].item() == 30
    assert not calibrated(table, table["sample_id"].to_numpy()).lines


def test_the_same_measurement_gives_the_same_table():
    table = population(30, 0)
    assert calibrated(table).trust.equals(calibrated(table).trust)
    assert calibrated(table, seed=1).trust["spearman"].equals(calibrated(table).trust["spearman"])


def test_one_sample_that_makes_the_line_is_no_error():
    table = population(12, 0).with_columns(product=pl.Series([0.0] * 11 + [1.0]), value_per_token=pl.Series(range(12)))
    line = calibrated(table.with_columns(pl.col("value_per_token").cast(float))).lines.get("a")
    assert line is None or np.isfinite(line.error)


def test_two_predictors_are_judged_by_fits_to_the_other_samples():
    table, other = population(40, 3), np.random.default_rng(4).standard_normal(40)
    values = table["value_per_token"] + pl.Series(3 * other)
    both = np.stack([table["product"].to_numpy(), other], 1)
    measured = table.with_columns(value_per_token=values)
    found = calibrate(measured, both, NONE, {"a": 40}, NAMES, 0)
    exact, tokens = values.to_numpy(), table["predicted_tokens"].to_numpy()
    design = np.column_stack([np.ones(40), both])

    def fitted(rows):
        root = np.sqrt(tokens[rows])[:, None]
        return np.linalg.lstsq(design[rows] * root, exact[rows] * root[:, 0], rcond=None)[0]

    line = found.lines["a"]
    np.testing.assert_allclose([line.intercept, *line.slopes], fitted(np.arange(40)))
    without = [design[row] @ fitted(np.delete(np.arange(40), row)) for row in range(40)]
    assert found.trust["spearman"].item() == pytest.approx(spearmanr(without, exact).statistic)
    np.testing.assert_allclose(found.values(np.array(["a"] * 40), both), design @ fitted(np.arange(40)))
    # together they rank better than each: that is what the second one is for
    assert found.trust["spearman"].item() > max(abs(spearmanr(column, exact).statistic) for column in both.T)


def test_products_stand_alone_where_the_other_predictor_is_not_known_or_says_nothing_new():
    table = population(40, 5)
    products = table["product"].to_numpy()
    alone = calibrated(table)
    for other in (np.where(np.arange(40) == 7, np.nan, 1.0), 2 * products, np.ones(40)):
        both = np.stack([products, other], 1)
        found = calibrate(table, both, NONE, {"a": 40}, NAMES, 0)
        known = np.isfinite(other)
        wanted = alone.values(np.array(["a"] * 40), products[:, None])
        got = found.values(np.array(["a"] * 40), both)
        np.testing.assert_allclose(got[known], wanted[known])
        assert np.isfinite(got).all()
