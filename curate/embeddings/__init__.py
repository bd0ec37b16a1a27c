"""Value embeddings: rows `E[z]` such that the value of z for a target is `<E[z], t>`."""
