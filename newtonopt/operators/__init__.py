"""Curvature matrices, known by their products with vectors.

- `linear_operator`: `LinearOperator`, a matrix known by `A @ v`.
- `matrices`: `hessian`, `gauss_newton` and `jacobian` of an evaluation.
- `products`: how their products are formed: cached, streamed, or by finite differences.
- `verification`: the checks that products pass before anybody sees a number.

`matrices` takes products from `products`, has `verification` examine them, and gives a `linear_operator`.
"""
