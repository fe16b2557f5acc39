"""The user's closure as a function of the parameters.

- `objective`: the closure, made callable at any point without a trace. `evaluate` gives an `Evaluation`.
- `evaluation`: what is known at one point: loss, gradient, graph, outputs.
- `tap`: sees what the closure calls while it runs: `backward`, loss functions, marks of outputs.
- `losses`: which calls are recognised as convex losses, in which outputs, and what to write instead if none is.
  `squares` recognises squares written by hand; `losses.decompose` decides whether they count.
- `accumulation`: which losses count, by what the closure does with `.grad` between its calls of `backward`.
- `isolation`: puts back everything that a run has changed: random state, Python objects, which `reach` finds, and
  tensors, which `writes` keeps.

`objective` runs the closure inside `isolation` and under a `tap`, and makes an `evaluation` of what that has seen.
"""
