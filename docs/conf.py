"""Sphinx configuration."""

import microadam_optax

project = "microadam_optax"
copyright = "the microadam_optax developers"
release = microadam_optax.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"
html_theme = "furo"
html_title = "microadam_optax"
exclude_patterns = ["_build"]
