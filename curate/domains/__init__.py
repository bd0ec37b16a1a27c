"""Scores: what samples, documents, shards and domains were worth to a target, with intervals."""
