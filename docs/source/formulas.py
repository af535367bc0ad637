# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Formulas as SVG inside the page: no script, no font, no request; they take the colour of the text."""

import html
import re
import xml.etree.ElementTree as ET
from typing import Any

import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator
from ziamath.tex import tex2mml

#: Pixels; the theme's text has 16.
SIZE = 17.5


def svg(formula: str, inline: bool) -> str:
    """The picture of a formula, with its source as the text that a screen reader reads."""
    source = " ".join(formula.split())
    if r"\\" in source and r"\begin" not in source:
        source = rf"\begin{{aligned}}{source}\end{{aligned}}"
    # a hat is as wide as a hat, not as its letter
    formula_tree = ET.fromstring(tex2mml(source, inline=inline).replace("&#x00302;", "&#710;"))
    formula_tree.set("mathcolor", "currentColor")
    picture = ziamath.Math(formula_tree, size=SIZE)
    drawing = re.sub(r"\s+", " ", picture.svg())
    style = f' style="vertical-align:{picture.getyofst():.2f}px"' if inline else ""
    label = html.escape(source, quote=True)
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{label}"{style} ', 1)


def visit_inline(self: HTML5Translator, node: nodes.Element) -> None:
    self.body.append(f'<span class="math">{svg(node.astext(), inline=True)}</span>')
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.Element) -> None:
    self.body.append(f'<div class="math">{svg(node.astext(), inline=False)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    ziamath.config.svg2, ziamath.config.precision = (
        False,
        2,
    )  # paths inside the picture, no shared symbols: pages are cut and joined freely
    app.add_html_math_renderer("svg", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
