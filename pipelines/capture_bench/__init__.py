"""Recording, capture and recursion: what they cost (see `__main__`)."""
