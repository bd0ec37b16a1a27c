"""The fidelity bench: every estimator against training that was run again, on real text, with seeds."""
