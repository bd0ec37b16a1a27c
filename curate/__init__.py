"""Data curation for language-model pretraining: which training samples moved the model towards your target."""

from curate.core.interrupts import guard_imports

guard_imports(__name__)
