"""Mixture: how many tokens of each domain the next stage trains on, and why."""
