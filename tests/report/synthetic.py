"""A small report's data, the same at every call."""

import math

import polars as pl

from curate.core.artifacts import SIGN
from curate.core.rng import generator
from curate.report.data import ReportData

DOMAINS = ["api_prose", "cpp_headers", "docstrings", "endpoint_rules", "minified_js", "package_tests", "stdlib_python"]
EFFECT = {"api_prose": 0.9, "docstrings": 1.6, "stdlib_python": 0.5, "cpp_headers": -0.3, "package_tests": 0.1}
WINDOWS = {"early": (0, 30), "late": (270, 300)}
TEXTS = {
    "most": (
        'def mean(x):\n    """Average along an axis.\n\n'
        '    Returns <array> & "quotes" of\n\tshape (n,)."""\n    return x.sum() / len(x)\n'
    )
    * 3,
    "least": "!function(t,e){for(var n=0;n<e.length;)t[n]=e[n++]}({},[]);</script><script>alert(1)</script>" * 9,
}


def lr(step: int) -> float:
    return 2e-3 * min(1.0, (step + 1) / 20) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 300)))


def curve() -> pl.DataFrame:
    random = generator(0, "curve")
    rows = []
    for window, (first, stop) in WINDOWS.items():
        for domain in DOMAINS:
            strength = EFFECT.get(domain, -0.8) * (1.0 if window == "late" else 0.35)
            for step in range(first, stop):
                per_lr = 1e-3 * (strength + 0.9 * random.standard_normal())
                rows.append((window, step, domain, per_lr * lr(step), per_lr))
    return pl.DataFrame(rows, schema=["source", "step", "domain", "value", "value_per_lr"], orient="row")


def training() -> pl.DataFrame:
    random = generator(0, "training")
    steps = range(300)
    return pl.DataFrame(
        {
            "step": list(steps),
            "loss": [4.2 + 4.5 * math.exp(-step / 45) + 0.06 * random.standard_normal() for step in steps],
            "lr": [lr(step) for step in steps],
            "grad_norm": [0.8 + 2.5 * math.exp(-step / 25) + 0.1 * random.random() for step in steps],
        }
    )


def domains(target: str) -> pl.DataFrame:
    rows = []
    for window in WINDOWS:
        for domain in DOMAINS:
            score = EFFECT.get(domain, -0.8) * (0.25 if window == "late" else 0.1)
            se = 0.05 if window == "late" else 0.07
            unseen = domain == "minified_js" and window == "early"
            per_token = None if unseen else score * 3e-6
            rows.append(
                {
                    "source": window,
                    "target": target,
                    "domain": domain,
                    "samples": 0 if unseen else 112,
                    "predicted_tokens": 0 if unseen else 56_842,
                    "value_per_token": per_token,
                    "se": None if unseen else se * 3e-6,
                    "low": None if unseen else (score - 2 * se) * 3e-6,
                    "high": None if unseen else (score + 2 * se) * 3e-6,
                    "score": 0.0 if unseen else score,
                    "score_low": None if unseen else score - 2 * se,
                    "score_high": None if unseen else score + 2 * se,
                    "shrunk": 0.0 if unseen else score * 0.8,
                    "value_score": 0.0 if unseen else score,
                    "ngram_ratio": None,
                    "novel_share": 0.9,
                }
            )
    return pl.DataFrame(rows, schema_overrides={"ngram_ratio": pl.Float64})


def mixture() -> pl.DataFrame:
    weights = [0.27, 0.05, 0.385, 0.01, 0.014, 0.08, 0.191]
    binding = [None, None, "max_epochs", "floor", None, None, None]
    return pl.DataFrame(
        {
            "domain": DOMAINS,
            "prior": [1 / 7] * 7,
            "weight": weights,
            "stored_tokens": [round(2_457_600 * weight) for weight in weights],
            "samples": [round(4800 * weight) for weight in weights],
            "epochs": [6 * weight for weight in weights],
            "epochs_so_far": [2 * weight for weight in weights],
            "binding": binding,
            "unconstrained": weights,
            "by_early": [1 / 7] * 7,
            "by_late": weights,
        }
    )


def sweep() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "prior_strength": [0.25, 0.5, 1.0],
            "expected_score": [0.4, 0.3, 0.2],
            "kl_to_prior": [0.9, 0.4, 0.1],
            "effective_domains": [2.5, 4.1, 6.0],
            "retained_score": [None, None, None],
            **{f"share_{domain}": [1 / 7] * 3 for domain in DOMAINS},
        },
        schema_overrides={"retained_score": pl.Float64},
    )


def examples() -> pl.DataFrame:
    rows = [
        {
            "kind": kind,
            "rank": rank,
            "source": "late",
            "step": 299 - 3 * rank,
            "domain": "docstrings" if kind == "most" else "minified_js",
            "sample_id": 5_812_345_678_901_234_567 - rank,
            "value": (1 if kind == "most" else -1) * 4e-4 / rank,
            "text": TEXTS[kind],
        }
        for kind in ("most", "least")
        for rank in range(1, 7)
    ]
    return pl.DataFrame(rows)


def reliability(target: str, late: float) -> pl.DataFrame:
    rows = [
        (window, target, ranking, 784, r, r - 0.05, r + 0.05, 2 * r / (1 + r), 0.4, 0.9)
        for window, r in (("early", 0.62), ("late", late))
        for ranking in ("pooled", "within_step")
    ]
    names = ["source", "target", "ranking", "samples", "spearman", "low", "high", "reliability"]
    return pl.DataFrame(rows, schema=[*names, "reliability_low", "reliability_high"], orient="row")


def report_data(target: str = "astronomy docstrings", late_reliability: float = 0.8) -> ReportData:
    shuffled = "shard weights would do nothing here: samples were shuffled into shards; sample-level selection is used"
    return ReportData(
        run="demo",
        target=target,
        target_documents=240,
        target_tokens=61_440,
        retain="general",
        estimator="adjoint",
        horizons={"early": "window_end", "late": "stage_end"},
        mixture_source="late",
        sign=SIGN,
        budget_tokens=2_500_000,
        loader='streams = yaml.safe_load(Path("runs/demo/select/data/streams.yaml").read_text())\n'
        "dataset = StreamingDataset(streams=[Stream(**stream) for stream in streams], batch_size=16, shuffle=True)",
        settings={"mixture": {"prior_strength": 0.5}, "seed": 0},
        reliability=reliability(target, late_reliability),
        curve=curve(),
        training=training(),
        domains=domains(target),
        mixture=mixture(),
        sweep=sweep(),
        targets=domains(target).filter(source="late").with_columns(weight=pl.lit(1.0)),
        examples=examples(),
        shards=pl.DataFrame(
            {
                "source": ["late"] * 7,
                "domain": DOMAINS,
                "shards": [3] * 7,
                "samples": [112] * 7,
                "share_between": [0.0, 0.004, None, 0.0, 0.01, 0.0, 0.002],
                "p_value": [0.6, 0.3, None, 0.8, 0.09, 0.5, 0.4],
                "verdict": [shuffled] * 7,
            }
        ),
        costs=pl.DataFrame(
            {
                "phase": ["replay", "adjoint", "index", "report"],
                "passes": [60.0, 171.5, None, None],
                "seconds": [41.2, 128.7, 0.4, 1.9],
                "bytes": [None, 3_412_000, 1_204_000, 5_100_000],
                "note": ["60 window steps of 300", "2.9 passes per step and anchor", "exact, recall 1", None],
            }
        ),
    )
