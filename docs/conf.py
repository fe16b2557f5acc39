"""Settings of the site: `make docs` builds it, with every warning an error and without the network."""

from __future__ import annotations

import sys
from pathlib import Path

import newtonopt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

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
    "formulas",
    "reference",
]
exclude_patterns = ["_build"]
# Every reference must lead somewhere.
nitpicky = True

# Pages are Markdown. Headings of three levels can be linked to by their text, as on a code host.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"newtonopt {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
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
add_module_names = False
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
