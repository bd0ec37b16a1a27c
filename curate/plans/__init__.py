"""A plan of training stages, and the runner that carries it out between and around them."""
