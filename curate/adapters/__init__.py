"""Recorders for other trainers' loops."""
