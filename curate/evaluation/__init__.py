"""Fidelity: values held against training that was really run again without the samples."""
