"""Measurements that `measure` and `CurvatureMonitor` take: one class in one file, with its tags and their
units, its charts, its sentences and its figures.

- `measurement`: what a `Measurement` is; the `View` of the point that it is taken at; `take`, which takes a list of
  them within a budget; and what comes of it, `Measured`.
- `eigenvalues`: the extreme eigenvalues, and how those of other matrices are found and shown.
- `course`: the training loss between measurements, and the trouble that it shows.
- `gradient`, `preconditioned`, `stability`, `layers`, `trace`, `density`, `gauss_newton`, `alignment`, `sharpness`,
  `relative_sharpness`, `loss_slice`: one measurement each.

`take` asks each measurement for its result at the view. One that needs the result of another asks the view for it, by
its class. The callbacks then ask the results for values, sentences, charts and figures.
"""
