"""File formats: MDS streams, documents as JSONL, datasets that Hugging Face `datasets` reads."""
