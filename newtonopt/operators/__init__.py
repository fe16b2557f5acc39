"""Curvature matrices, known by their products, which are checked before they are returned.

- `linear_operator`: `LinearOperator`, a matrix known by `A @ v`.
- `matrices`: `hessian`, `gauss_newton` and `jacobian` of an evaluation.
- `products`: how their products are formed: cached, streamed, or by finite differences.
- `verification`: compares products with their transposes, and Hessian products with differences of gradients, before
  the first one is given out.

`matrices` takes products from `products`, has `verification` examine them, and gives them out as a `linear_operator`.
`verification` forms products too, by the same functions, to compare them.
"""
