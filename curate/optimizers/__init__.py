"""Optimizer updates as pure functions of vectors, with vector-Jacobian products; any mix over parameter groups."""
