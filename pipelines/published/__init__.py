"""The published setting: a small network, plain SGD, and estimators held against retraining without a sample."""
