"""The user's closure as a function of the parameters.

- `objective`: the closure, made callable at any point without a trace. `evaluate` gives an `Evaluation`.
- `evaluation`: what is known at one point: loss, gradient, graph, outputs.
- `tap`: sees what the closure calls while it runs: `backward`, loss functions, marks of outputs.
- `losses`: which of these calls are convex losses, of which outputs, and what to write instead of others. `squares`:
  squares written by hand, which count as such losses.
- `accumulation`: which losses count, by what the closure does with `.grad` between its calls of `backward`.
- `isolation`: puts back what a run has changed. `reach` finds the Python objects it may change, and `writes` keeps the
  tensors that it writes to.

`objective` runs the closure inside `isolation` and under a `tap`, and makes an `evaluation` of what that has seen.
"""
