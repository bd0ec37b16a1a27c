"""Output: the next stage's data, as weights of the streams there are or as new MDS folders."""
