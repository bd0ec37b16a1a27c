"""End-to-end recipes on top of `curate`: demo corpus, data preparation, a plain pretraining loop, branch comparison."""
