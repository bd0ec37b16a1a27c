"""Influence: what one more use of a sample would do to the targets, from the state that training is in now."""
