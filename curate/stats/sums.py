"""Sums and means of groups that have the same last digits in every run.

`sum()` and `mean()` of a `group_by` are added up from parts whose sizes and order depend on threads; these go from the
first row of a group to its last. Only floating point needs them: whole numbers add up to the same in any order.
"""

import polars as pl


def row_sum(values: pl.Expr) -> pl.Expr:
    """The sum of a group, row after row; 0 for no rows."""
    return values.implode().list.sum()


def row_mean(values: pl.Expr) -> pl.Expr:
    """The mean of a group, row after row."""
    return values.implode().list.mean()
