"""Solvers for `min g's + s'As / 2` and for eigenvalues, on anything with `A @ v`."""
