"""End-to-end recipes on top of `curate`: demo corpus, data preparation, a plain pretraining loop, branch comparison."""

from curate.core.interrupts import guard_imports

guard_imports(__name__)
