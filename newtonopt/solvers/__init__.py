"""Solvers of anything with `A @ v`: they know vectors and numbers, and nothing of closures or optimizers.

- `cg`: preconditioned conjugate gradients, truncated and in a ball. `preconditioners`: what they are helped by.
- `lanczos`: the Lanczos process. `krylov`: minimisers in the space that it spans.
- `negative_curvature`: a direction of negative curvature.
- `dense`: solutions with the whole matrix.
- `secular`: the secular equations of the ball and of the cubic term, which `krylov` and `dense` solve.
- `solution`: what all of them return.
"""
