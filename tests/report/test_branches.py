"""The page of the branch bench: what its curves are made of."""

import json

import pytest

from curate.report.branches import curves_figure


def row(method, seed, temperature, target, general, schedule="constant"):
    return {
        "case": "inside", "method": method, "seed": seed, "temperature": temperature, "schedule": schedule,
        "kl_to_prior": 0.1, "target_loss": target, "general_loss": general,
    }  # fmt: skip


def test_a_curve_is_the_mean_over_seeds_of_branches_of_the_constant_schedule():
    rows = [
        row("proportional", 0, 1.0, 5.0, 4.0), row("proportional", 1, 1.0, 6.0, 4.2),
        row("curate", 0, 0.5, 4.8, 4.1), row("curate", 1, 0.5, 5.6, 4.2),
        row("curate", 0, 0.25, 4.5, 4.3), row("curate", 1, 0.25, 5.3, 4.5),
        row("curate", 0, 0.5, 4.0, 3.0, "early-late"),
        {**row("curate", 0, 0.5, 1.0, 1.0), "case": "noisy"},
    ]  # fmt: skip
    (line,) = json.loads(curves_figure(rows, "inside"))["data"]
    assert line["x"] == pytest.approx([0.0, 0.05, 0.3])
    assert line["y"] == pytest.approx([0.0, -0.3, -0.6])
