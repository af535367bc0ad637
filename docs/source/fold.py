# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""``.. fold:: TITLE``: content that a click opens."""

from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


class fold(nodes.Element):
    """What is folded, with its title."""


class Fold(Directive):
    """The directive."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        node = fold(title=self.arguments[0])
        self.state.nested_parse(self.content, self.content_offset, node)
        return [node]


def visit(self: HTML5Translator, node: fold) -> None:
    self.body.append(f'<details class="fold"><summary>{self.encode(node["title"])}</summary>\n')


def depart(self: HTML5Translator, node: fold) -> None:
    self.body.append("</details>\n")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_node(fold, html=(visit, depart))
    app.add_directive("fold", Fold)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
