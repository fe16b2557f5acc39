"""Derivatives by torch's autograd.

- `gradients`: derivatives, once and twice, with kernels that allow it and errors that say what to do.
- `graph`: walks through autograd graphs.
- `samples`: which sample each entry of a gradient inside a graph belongs to, and where a graph sums over samples.
- `contributions`: each sample's contribution to the gradient of an operand, operation by operation.
- `routes`: from an operand to the parameters that it is a function of.

`gradients` looks through its results with `graph`. `closure` and `operators` call both. `operators.rows` has `samples`
find where parameters enter, `contributions` what each sample contributes there, and `routes` the parameter meant.
"""
