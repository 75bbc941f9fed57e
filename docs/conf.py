"""Sphinx: the pages of this folder, and the API reference from the docstrings. `make docs` builds it, strictly."""

from __future__ import annotations

import ffr_ext

project = "ffr_ext"
version = release = ffr_ext.__version__
html_title = f"ffr_ext {version}"
html_theme = "furo"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # the signature shows them
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
