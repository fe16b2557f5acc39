"""The plugin: how TensorBoard finds the "Curvature" tab, and the data that the page asks for."""

from __future__ import annotations

import hashlib
import json
import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboard import context as request_context
from tensorboard.backend import experiment_id, http_util
from tensorboard.data import provider
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from .records import scalar_series, series

NAME = "newtonopt_curvature"
# TensorBoard keeps this many records of a run and a monitor, and drops some at random beyond; its own default is 10.
_SAMPLES = 10_000
# TensorBoard keeps a thousand points of a scalar.
_SCALAR_SAMPLES = 1_000
_SCALARS = "scalars"
# Scalars of StepMarginMonitor, by the ends of their tags.
_MARGINS = ("/step_margin", "/critical_sharpness", "/overshot_steps", "/uphill_steps", "/highest_step_margin")
_FILES = {"/index.js": "text/javascript", "/style.css": "text/css"}

_logger = logging.getLogger(__name__)


class CurvatureLoader(base_plugin.TBLoader):  # type: ignore[misc]
    """Load the tab, and make TensorBoard keep 10,000 measurements of each run, unless the command line says how many.

    TensorBoard finds this class by the entry point `tensorboard_plugins`.
    """

    def fix_flags(self, flags: Namespace) -> None:
        """Set how many records TensorBoard keeps."""
        flags.samples_per_plugin = {NAME: _SAMPLES, **(flags.samples_per_plugin or {})}

    def load(self, context: base_plugin.TBContext) -> CurvatureTab:
        """Return the tab."""
        return CurvatureTab(context)


class CurvatureTab(base_plugin.TBPlugin):  # type: ignore[misc]
    """The "Curvature" tab: its page and the data that the page asks for. It reads and never writes.

    Args:
        context: The context that TensorBoard passes to its plugins.
    """

    plugin_name = NAME

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._provider: Any = context.data_provider

    def is_active(self) -> bool:
        """Return whether there is anything to show: a measurement, or a step of an optimizer of ours."""
        try:
            return bool(self._contents(request_context.RequestContext(), ""))
        except Exception as error:  # an exception here is logged by TensorBoard each time it looks for plugins
            _logger.warning("The Curvature tab cannot list its data: %s", error)
            return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Return the tab's name and page."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Curvature")

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """Return the routes: two files, the list of runs, and the data of runs."""
        return {
            **{path: _file(path, kind) for path, kind in _FILES.items()},
            "/runs": self._route(self._runs),
            "/data": self._route(self._data),
        }

    def _route(self, answer: Callable[[wrappers.Request], tuple[str, Callable[[], Any]]]) -> Callable[..., Any]:
        """Return a WSGI application that answers in JSON, or that nothing has changed since the page last asked.

        Args:
            answer: Returns for a request a mark that changes with the answer, and a function that computes the answer.
        """

        @wrappers.Request.application
        def serve(request: wrappers.Request) -> Any:
            try:
                mark, compute = answer(request)
                tag = f'"{hashlib.sha256(mark.encode()).hexdigest()[:32]}"'
                if request.headers.get("If-None-Match") == tag:
                    return _unchanged(tag)
                text, headers = json.dumps(compute(), allow_nan=False), [("ETag", tag)]
            except Exception as error:
                _logger.warning("The Curvature tab cannot read its data: %s", error)
                text = json.dumps({"error": f"TensorBoard could not read the data: {type(error).__name__}: {error}"})
                headers = []
            return http_util.Respond(request, text, "application/json", headers=headers)

        return serve

    def _runs(self, request: wrappers.Request) -> tuple[str, Callable[[], Any]]:
        """Answer with the runs, by name, and the monitors in each, by the prefix of their tags."""
        contents = self._contents(*_asker(request))
        runs = [
            {"run": run, "prefixes": sorted(map(_prefix_of, tensors))} for run, (tensors, _) in sorted(contents.items())
        ]
        return json.dumps(runs), lambda: {"runs": runs}

    def _data(self, request: wrappers.Request) -> tuple[str, Callable[[], Any]]:
        """Answer with records and scalars of the runs asked for."""
        ctx, experiment = _asker(request)
        asked = request.args.getlist("run")
        contents = self._contents(ctx, experiment, asked)
        mark = json.dumps([asked, [[run, *map(_mark, contents[run])] for run in sorted(contents)]])
        return mark, lambda: {"runs": {run: self._run(ctx, experiment, run, *contents[run]) for run in contents}}

    def _contents(
        self, ctx: Any, experiment: str, runs: list[str] | None = None
    ) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Return for each run with data its records and its scalars by tag, as TensorBoard lists them."""
        wanted = provider.RunTagFilter(runs=runs)
        where = {"experiment_id": experiment, "run_tag_filter": wanted}
        records = self._provider.list_tensors(ctx, plugin_name=NAME, **where)
        scalars = self._provider.list_scalars(ctx, plugin_name=_SCALARS, **where)
        ours = {
            run: {tag: found for tag, found in tags.items() if _is_step(tag) or "loss" in tag.lower()}
            for run, tags in scalars.items()
        }
        stepping = {run for run, tags in ours.items() if any(map(_is_step, tags))}
        return {run: (records.get(run, {}), ours.get(run, {})) for run in {*records, *stepping}}

    def _run(
        self, ctx: Any, experiment: str, run: str, records: Mapping[str, Any], scalars: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the data of one run. What cannot be read leaves a sentence in `errors`, and the rest as it is."""
        monitors, lines, errors = {}, {}, []
        for tag in records:
            try:
                data = self._read(self._provider.read_tensors, ctx, experiment, NAME, run, [tag], _SAMPLES)
                points = [(datum.step, datum.wall_time, _entry(datum.numpy)) for datum in data.get(tag, ())]
                monitors[_prefix_of(tag)] = series(points)
            except Exception as error:
                errors.append(f"The records {tag} cannot be read: {type(error).__name__}.")
        try:
            data = self._read(
                self._provider.read_scalars, ctx, experiment, _SCALARS, run, list(scalars), _SCALAR_SAMPLES
            )
            lines = {tag: scalar_series((d.step, d.wall_time, d.value) for d in points) for tag, points in data.items()}
        except Exception as error:
            errors.append(f"The scalars cannot be read: {type(error).__name__}.")
        return {"monitors": monitors, "scalars": lines, "errors": errors}

    def _read(
        self, read: Any, ctx: Any, experiment: str, plugin: str, run: str, tags: list[str], samples: int
    ) -> Mapping[str, Any]:
        """Return points by tag."""
        wanted = provider.RunTagFilter(runs=[run], tags=tags)
        found = read(ctx, experiment_id=experiment, plugin_name=plugin, downsample=samples, run_tag_filter=wanted)
        return found.get(run, {})  # type: ignore[no-any-return]


def _file(path: str, kind: str) -> Callable[..., Any]:
    """Return a WSGI application that serves a file of the page."""

    @wrappers.Request.application
    def serve(request: wrappers.Request) -> Any:
        return http_util.Respond(request, (Path(__file__).parent / path[1:]).read_bytes(), kind)

    return serve


def _unchanged(tag: str) -> Callable[..., Any]:
    """Return a WSGI application that answers without a body, with the headers that TensorBoard asks of every answer.

    werkzeug's Response drops the type of such an answer, and TensorBoard warns each time one comes without it.
    """
    headers = [("ETag", tag), ("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff")]

    def answer(environ: Any, start_response: Any) -> list[bytes]:
        start_response("304 NOT MODIFIED", headers)
        return []

    return answer


def _asker(request: wrappers.Request) -> tuple[Any, str]:
    """Return what TensorBoard's data provider wants to know of a request: its context, and the experiment asked for."""
    return request_context.from_environ(request.environ), request.environ.get(experiment_id.WSGI_ENVIRON_KEY, "")


def _is_step(tag: str) -> bool:
    """Return whether a scalar is one of StepMonitor's or StepMarginMonitor's."""
    return tag.startswith("newton/") or tag.endswith(_MARGINS)


def _prefix_of(tag: str) -> str:
    """Return a monitor's prefix from the tag of its records."""
    return tag.removesuffix("/record")


def _mark(listed: Mapping[str, Any]) -> list[Any]:
    """Return what changes whenever one of these series grows."""
    return sorted((tag, found.max_step, found.max_wall_time) for tag, found in listed.items())


def _entry(array: Any) -> object:
    """Return the only entry of a tensor; None if it has another number of entries."""
    return array.item() if array.size == 1 else None
