"""Data curation for language-model pretraining: which training samples moved the model towards your target."""
