"""Sphinx configuration."""

import latex2mathml.converter
from docutils import nodes

import microadam_optax

project = "microadam_optax"
copyright = "the microadam_optax developers"
release = microadam_optax.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"
napoleon_attr_annotations = False
napoleon_use_ivar = True
default_role = "py:obj"  # of the docstrings' backquotes: a link, or code
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "microadam_optax"
html_static_path = ["_static"]
html_css_files = ["page.css"]
exclude_patterns = ["_build"]


def mathml(block):
    """A visitor that writes an equation as MathML, which browsers show by themselves."""

    def visit(self, node):
        equation = latex2mathml.converter.convert(
            node.astext(), display="block" if block else "inline"
        )
        self.body.append(f'<div class="math">{equation}</div>' if block else equation)
        raise nodes.SkipNode

    return visit, None


def setup(app):
    """Tells Sphinx."""
    app.add_html_math_renderer("mathml", mathml(False), mathml(True))
