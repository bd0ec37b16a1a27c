"""The estimators by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from curate.embeddings.adjoint_estimator import AdjointConfig, AdjointEstimator
from curate.embeddings.baselines import BaselineConfig, BaselineEstimator
from curate.embeddings.dvemb_adam_estimator import DvembAdamConfig, DvembAdamEstimator
from curate.embeddings.dvemb_estimator import DvembConfig, DvembEstimator

if TYPE_CHECKING:
    from curate.embeddings.estimator import Estimator

__all__ = ["AdjointConfig", "BaselineConfig", "DvembAdamConfig", "DvembConfig", "EstimatorName", "make_estimator"]

EstimatorName = Literal["adjoint", "anchors", "dvemb", "dvemb-adam", "grad-dot", "less", "shapley"]


def make_estimator(
    name: EstimatorName,
    adjoint: AdjointConfig,
    dvemb: DvembConfig,
    dvemb_adam: DvembAdamConfig,
    baseline: BaselineConfig | None = None,
) -> Estimator:
    """The estimator of that name."""
    if name in ("adjoint", "anchors"):
        return AdjointEstimator(adjoint, with_target=name == "adjoint")
    if name in ("grad-dot", "less", "shapley"):
        return BaselineEstimator(name, baseline or BaselineConfig())
    return DvembEstimator(dvemb) if name == "dvemb" else DvembAdamEstimator(dvemb_adam)
