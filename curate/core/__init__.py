"""Core: configs, artifacts, locks, errors: what every part stands on and nothing of the product."""
