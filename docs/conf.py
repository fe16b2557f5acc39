"""Settings of the site: `make docs` builds it, with every warning an error and without the network."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx_gallery.sorting import ExplicitOrder

import newtonopt

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "extensions")]

import draw_benchmarks  # noqa: E402

project = "newtonopt"
author = "newtonopt developers"
project_copyright = author
version = release = newtonopt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "formulas",
    "offline",
    "reference",
]
exclude_patterns = ["_build", "benchmarks/drawn"]
# Every reference must lead somewhere.
nitpicky = True

# Pages are Markdown. Headings of three levels can be linked to by their text, as on a code host.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"newtonopt {release}"
html_static_path = ["_static"]
html_css_files = ["site.css", "reference.css"]
html_copy_source = False
# Prompts and results are not copied.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Single backticks in docstrings are code, as in Markdown; the extension `reference` makes links of public names.
default_role = "literal"
templates_path = ["_templates"]
# Formulas are MathML, so that none is drawn by a script from elsewhere.
html_math_renderer = "mathml"

# Types stand with the arguments; a signature shows names and defaults, and on a narrow screen one a line.
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
maximum_signature_line_length = 60
toc_object_entries_show_parents = "hide"
add_module_names = True
autosummary_generate = True
# Files whose names differ in capitals alone would be one file on some disks: `Trace` and `trace`.
autosummary_filename_map = {
    f"newtonopt.curvature.{name}": f"newtonopt.curvature.{name}-function"
    for name in ("diagonal", "preconditioned", "sharpness", "trace")
}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
# Dashes are set, quotes are not: those in docstrings are code.
smartquotes_action = "D"

# Names of other projects that our docstrings mention, in text files, because building needs no network.
intersphinx_mapping = {
    name: (url, str(HERE / "inventories" / f"{name}.txt"))
    for name, url in {
        "python": "https://docs.python.org/3/",
        "torch": "https://docs.pytorch.org/docs/stable/",
        "lightning": "https://lightning.ai/docs/pytorch/stable/",
        "numpy": "https://numpy.org/doc/stable/",
        "scipy": "https://docs.scipy.org/doc/scipy/",
        "matplotlib": "https://matplotlib.org/stable/",
    }.items()
}

# The gallery's programs are run while the site is built; each becomes a page and a notebook.
sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": ExplicitOrder(
        [
            "batch_jacobian.py",
            "quadratic.py",
            "hessian_spectrum.py",
            "critical_points.py",
            "saddle_map.py",
            "taylor.py",
            "fastest_direction.py",
            "optimizer_paths.py",
            "tangent_kernel.py",
            "gpt_learning_rate.py",
        ]
    ),
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "image_srcset": ["2x"],
    "first_notebook_cell": "# Needs newtonopt and matplotlib.\n%matplotlib inline",
}


def setup(app: Sphinx) -> None:
    """Draw the benchmark pages' tables and pictures from the committed records."""
    app.connect("builder-inited", lambda _: draw_benchmarks.write(draw_benchmarks.DRAWN))
