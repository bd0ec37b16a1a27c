"""Index: maximum-inner-product search over a window's embeddings with FAISS."""
