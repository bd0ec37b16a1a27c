"""Projected per-sample gradients."""
