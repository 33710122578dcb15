"""One file an algorithm, each built on vfl's public names alone."""
