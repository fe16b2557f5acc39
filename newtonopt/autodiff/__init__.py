"""Derivatives by torch's autograd.

- `gradients`: derivatives, once and twice, with errors that say what to do.
- `graph`: walks through autograd graphs.
- `kernels`: the kernels that can be differentiated twice, in place of those that cannot.

`gradients` differentiates under `kernels` and looks through the result with `graph`.
"""
