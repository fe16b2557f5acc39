"""Solvers of anything with `A @ v`: they know vectors and numbers, and nothing of closures or optimizers.

- `cg`: conjugate gradients, also in a ball (Steihaug). `preconditioners`: the Nystrom sketch and the diagonal, which
  speed them up.
- `lanczos`: the Lanczos process, and directions of negative curvature. `krylov`: minimisers in the space it spans.
- `dense`: minimisers with the whole matrix.
- `least_squares`: damped least squares with the rows of a matrix, in the smaller of its two dimensions.
- `secular`: the scalar equations of the ball and of the cubic term, which `krylov` and `dense` solve.
- `solution`: the result of all of them, a `Solution`.
"""
