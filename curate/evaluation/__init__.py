"""Evaluation: values compared with training that was really run again, and scores with short branches."""
