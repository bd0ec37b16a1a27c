"""Statistics: sums that repeat, deviations, bootstrap, rank correlation."""
