"""Pools: data that was never trained on, valued by probing a part of it and predicting the rest."""
