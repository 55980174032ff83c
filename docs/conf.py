"""How the documentation is built: `make docs`."""

from __future__ import annotations

import re
from importlib.metadata import version as installed_version
from typing import Any

project = "retrykit"
copyright = "the retrykit authors"
version = release = installed_version("retrykit")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "changelog.d"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# `name` in a docstring is code, as it is in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}

html_theme = "furo"
html_title = f"retrykit {release}"
html_show_sphinx = False


def setup(app: Any) -> None:
    """Read docstrings as the Markdown that they are, as far as they use it."""
    app.connect("autodoc-process-docstring", _from_markdown)


def _from_markdown(*told: Any) -> None:
    # Of what Sphinx tells, the last is the list of lines; it is to be changed in place.
    lines: list[str] = told[-1]
    code, read = False, []
    for line in lines:
        if line.startswith("```"):
            code = not code
            read += [f".. code-block:: {line[3:] or 'text'}", ""] if code else [""]
        else:
            read.append(f"    {line}" if code else _without_emphasis(line))
    lines[:] = read


def _without_emphasis(line: str) -> str:
    # An asterisk is an asterisk ("x-*"): docstrings have no emphasis. In backticks it is taken as it is anyway.
    return re.sub(r"(`[^`]*`)|\*", lambda found: found[1] or r"\*", line)
