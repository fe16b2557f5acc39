"""The user's closure as a function of the parameters.

- `objective`: the closure, made callable at any point without a trace. `evaluate` gives an `Evaluation`.
- `evaluation`: what is known at one point: loss, gradient, graph, outputs.
- `tap`: sees what the closure calls while it runs: `backward`, loss functions, writes to tensors.
- `losses`: which of these calls are convex losses, of which outputs.
- `accumulation`: what the closure does with `.grad` between its calls of `backward`.
- `lightning`: special cases for Lightning and accelerate.
- `isolation`: puts back what a run has changed. `reach`: finds what it may change.

`objective` runs the closure inside `isolation` and under a `tap`, and makes an `evaluation` of what that has seen.
"""
