"""Filter: which samples of a domain are good enough to be used, and why the others are not."""
