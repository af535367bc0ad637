# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of the documentation."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from numpy.typing import ArrayLike
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

from pyro_bnn import __version__

sys.path.insert(0, str(Path(__file__).parent))  # for isolate.py and the extensions of this folder
os.environ["TQDM_DISABLE"] = "1"  # a bar is for a terminal, not for a page

project = "pyro_bnn"
author = "Contributors to the pyro_bnn project"
copyright = author
release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
    "fold",
    "formulas",
    "markdown",
]
html_theme = "furo"
html_title = "pyro_bnn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
toc_object_entries_show_parents = "hide"
exclude_patterns = ["gallery/**/*.ipynb", "tables"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_preserve_defaults = True  # as the source writes them
# Names from libraries that are not cross-referenced; everything of this project must resolve.
nitpicky = False

sphinx_gallery_conf = {
    "examples_dirs": "../../tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": r"plot_",
    "abort_on_example_error": True,
    "capture_repr": (),  # a page shows what a script prints
    "reset_modules": ("matplotlib", "seaborn", "isolate.reset"),
    "within_subsection_order": "order.position",
    "min_reported_time": 1,
    "write_computation_times": False,  # that page loads scripts from elsewhere
    # The figures of the published site come from full runs; a smoke build checks that pages render.
    "plot_gallery": "PYRO_BNN_DOCS_NO_GALLERY" not in os.environ,
    "download_all_examples": False,
}


def plain_types(app: Sphinx, *_: Any) -> None:
    """numpy's union of everything like an array goes by its name; types beside a ``Literal`` are not parsed again."""
    union = stringify_annotation(ArrayLike, "smart")
    for annotations in app.env.current_document.autodoc_annotations.values():
        for argument, text in annotations.items():
            text = text.replace(union, "ArrayLike")
            annotations[argument] = re.sub(r"~(\w+\.)+", "", text) if "Literal[" in text else text


def written(found: nodes.field_list) -> set[str]:
    """The arguments and attributes that a list of fields describes in words."""
    names = [(field[0].astext().split(), field[1].astext()) for field in found]
    return {words[-1] for words, text in names if len(words) > 1 and words[0] != "type" and text}


def once(app: Sphinx, domain: str, kind: str, content: nodes.Element) -> None:
    """autodoc adds the types of all arguments to every list of fields; those that another list describes go."""
    lists = [node for node in content.children if isinstance(node, nodes.field_list)]
    everything = set().union(*map(written, lists))
    for found in lists:
        others = everything - written(found)
        found[:] = [field for field in found if field[0].astext().split()[-1] not in others]
        if not len(found):
            content.remove(found)


def setup(app: Sphinx) -> None:
    app.connect("object-description-transform", plain_types, priority=100)  # before autodoc writes them
    app.connect("object-description-transform", once, priority=900)
