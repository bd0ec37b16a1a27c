"""Configs, artifacts, locks and errors: what every other folder uses, and nothing of the product."""
