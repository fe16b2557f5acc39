"""The "Curvature" tab of TensorBoard, which shows what `CurvatureMonitor` and `StepMonitor` write.

- `plugin`: `CurvatureLoader`, the entry point by which TensorBoard finds the tab, and `CurvatureTab`, its routes.
- `records`: the measurements' records in event files, which are untrusted input, and how they go to the page.
- `index.js`, `style.css`: the page, one ES module and one style sheet.

The package installs as `newtonopt_tensorboard`. TensorBoard imports the plugins of an environment without a guard, so
that an import that fails would end every `tensorboard` there: this package imports TensorBoard, werkzeug, which
TensorBoard requires, and the standard library only.
"""
