"""Selection: from a finished stage and a target to the next stage's data."""
