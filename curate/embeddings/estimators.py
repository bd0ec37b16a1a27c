"""The estimators by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from curate.embeddings.adjoint_estimator import AdjointConfig, AdjointEstimator
from curate.embeddings.dvemb_adam_estimator import DvembAdamConfig, DvembAdamEstimator
from curate.embeddings.dvemb_estimator import DvembConfig, DvembEstimator

if TYPE_CHECKING:
    from curate.embeddings.estimator import Estimator

__all__ = ["AdjointConfig", "DvembAdamConfig", "DvembConfig", "EstimatorName", "make_estimator"]

EstimatorName = Literal["adjoint", "anchors", "dvemb", "dvemb-adam"]


def make_estimator(
    name: EstimatorName,
    adjoint: AdjointConfig,
    dvemb: DvembConfig,
    dvemb_adam: DvembAdamConfig,
) -> Estimator:
    """The estimator of that name."""
    if name in ("adjoint", "anchors"):
        return AdjointEstimator(adjoint, with_target=name == "adjoint")
    return DvembEstimator(dvemb) if name == "dvemb" else DvembAdamEstimator(dvemb_adam)
