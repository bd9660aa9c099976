"""The documentation as HTML: make docs, or python -m sphinx docs OUT with pip install vq[docs]."""

import vq

project = "vq"
author = "the vq authors"
version = release = vq.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"vq {release}"
exclude_patterns = ["tuning"]
myst_heading_anchors = 4
# Links to files of the repository lead to no page; and a word such as "size" in a docstring may be the name of several.
suppress_warnings = ["myst.xref_missing", "ref.python"]

napoleon_google_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the parameters' texts stand in the docstrings; types are in the stubs and the source
autodoc_default_options = {"members": True, "show-inheritance": True}
