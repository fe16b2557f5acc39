"""Derivatives by torch's autograd.

- `gradients`: derivatives, once and twice, with kernels that allow it and errors that say what to do.
- `graph`: walks through autograd graphs.

`gradients` looks through its results with `graph`. `closure` and `operators` call both.
"""
