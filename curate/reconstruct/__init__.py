"""A finished run that had no recorder, rebuilt from a description of it and checked against its log."""
