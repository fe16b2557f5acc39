"""Curvature matrices, known by their products, which are checked before they are returned.

- `linear_operator`: `LinearOperator`, a matrix known by `A @ v`.
- `matrices`: `hessian`, `gauss_newton` and `jacobian` of an evaluation.
- `products`: how their products are formed: cached, streamed, or by finite differences.
- `rows`: the rows of the outputs' Jacobian, all from a few backward passes, for losses that are sums over samples.
- `roots`: roots of the loss's Hessian by its outputs, which weigh the rows.
- `factors`: rows kept by parameter, as factors of outer products where that is cheaper.
- `verification`: compares products with their transposes, and Hessian products with differences of gradients, before
  the first one is given out.

`matrices` takes products from `products`, has `verification` examine them, and gives them out as a `linear_operator`.
`verification` forms products too, by the same functions, to compare them. `matrices` takes dense matrices from `rows`
where these are cheaper; `rows` weighs them by `roots` and keeps them as `factors`.
"""
