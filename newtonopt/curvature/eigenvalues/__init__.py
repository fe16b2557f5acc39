"""Extreme eigenvalues, each with an interval that holds it.

- `extreme`: `extreme_eigenvalues` and what it returns.
- `search`: the Lanczos runs that find the eigenvalues.
- `bounds`: intervals, from Lanczos coefficients and Ritz pairs.
- `ritz_values`: Ritz pairs.
"""
