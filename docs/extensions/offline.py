"""The site is read without the network: a script, style, font or picture from elsewhere on a page ends the build."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from sphinx.util import logging

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# Addresses that a browser fetches by itself; links that readers follow are something else.
FETCHED = {
    "*.html": re.compile(
        r'<(?:audio|embed|iframe|img|link|script|source|video)\b[^>]*\s(?:href|src)="((?:https?:)?//[^"]+)"'
    ),
    "*.css": re.compile(r"""(?:@import\s+|url\()["']?((?:https?:)?//[^"')\s]+)"""),
}


def warn_of_fetches(app: Sphinx, error: Exception | None) -> None:
    """Warn of each address that a page or a style sheet would fetch."""
    if error is None and app.builder.format == "html":
        for pattern, fetched in FETCHED.items():
            for file in sorted(Path(app.outdir).rglob(pattern)):
                for address in fetched.findall(file.read_text()):
                    logging.getLogger(__name__).warning("%s fetches %s", file.relative_to(app.outdir), address)


def setup(app: Sphinx) -> dict[str, bool]:
    """Look at the site once it is written."""
    app.connect("build-finished", warn_of_fetches)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
