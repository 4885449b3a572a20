"""Sphinx' configuration. ``tools.site.build`` has put the pages into the source directory."""

import re
from typing import Any

import pyvmm

project = "pyvmm"
copyright = "the authors of pyvmm, under the MIT licence"
version = release = pyvmm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
root_doc = "index"
exclude_patterns = ["_files"]

# Pages are written for GitHub: the same anchors, and the same links between files.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "html_image"]
suppress_warnings = ["misc.highlighting_failure"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 80
add_module_names = False

html_theme = "furo"
html_title = f"pyvmm {release}"
html_css_files = ["pyvmm.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1a5fb4", "color-brand-content": "#1a5fb4"},
    "dark_css_variables": {"color-brand-primary": "#78aeed", "color-brand-content": "#78aeed"},
}
pygments_style, pygments_dark_style = "default", "github-dark"
copybutton_exclude = ".linenos, .gp, .go"


def _docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Put fields that share a line into lines of their own, link the pages that are named, and tell
    the exit status of an error.
    """
    text = "\n".join(lines)
    if what == "exception":
        text += f"\n\nExit status: {thing.exit_code}\n"
    text = re.sub(r"\s+(?=:(?:param|returns?|raises|ivar)\b[^:\n]*:(?:\s|$))", "\n\n", text)
    text = re.sub(r"(?<![`/])docs/([\w-]+)\.md", r":doc:`docs/\1.md </docs/\1>`", text)
    lines[:] = text.split("\n")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _docstring)
