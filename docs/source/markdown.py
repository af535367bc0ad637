# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""``.. markdown:: FILE``: a file of headings, lists and inline code, such as the changelog, in a page."""

import re
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.nodes import nested_parse_with_titles

UNDERLINES = {1: "=", 2: "-", 3: "^"}


def to_rst(text: str) -> str:
    """Headings get lines below them, inline code its second backticks."""
    text = re.sub(r"`([^`]+)`", r"``\1``", text)
    return re.sub(
        r"^(#+) (.*)$", lambda m: f"{m[2]}\n{UNDERLINES[len(m[1])] * len(m[2])}", text, flags=re.MULTILINE
    )


class Markdown(Directive):
    """The directive."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        environment = self.state.document.settings.env
        path = Path(environment.relfn2path(self.arguments[0])[1])
        environment.note_dependency(str(path))
        node = nodes.section()
        node.document = self.state.document
        nested_parse_with_titles(
            self.state, StringList(to_rst(path.read_text()).splitlines(), str(path)), node
        )
        return node.children


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("markdown", Markdown)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
