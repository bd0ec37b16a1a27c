"""The estimators by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from curate.embeddings.adjoint_estimator import AdjointConfig, AdjointEstimator
from curate.embeddings.dvemb_estimator import DvembConfig, DvembEstimator

if TYPE_CHECKING:
    from curate.embeddings.estimator import Estimator

__all__ = ["AdjointConfig", "DvembConfig", "make_estimator"]


def make_estimator(name: Literal["adjoint", "dvemb"], adjoint: AdjointConfig, dvemb: DvembConfig) -> Estimator:
    """The estimator of that name."""
    return AdjointEstimator(adjoint) if name == "adjoint" else DvembEstimator(dvemb)
