# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Packages without which tests are skipped.
OPTIONAL = {"lightning"}


def imported(path: Path) -> set[str]:
    """The packages that a file imports at any place."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def declared() -> set[str]:
    """The distributions that ``pip install '.[test]'`` asks for by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names, queue = set(), [*project["dependencies"], "pyro-bnn[test]"]
    while queue:
        requirement = queue.pop()
        name = re.split(r"[\[<>=;!~ ]", requirement)[0].lower()
        if name == "pyro-bnn":
            queue += [
                r for extra in re.findall(r"[\w-]+", requirement.partition("[")[2]) for r in extras[extra]
            ]
        names.add(name)
    return names


def test_the_test_extra_holds_what_the_tests_import() -> None:
    packages = {name for path in (ROOT / "tests").rglob("*.py") for name in imported(path)}
    third_party = packages - set(sys.stdlib_module_names) - {"tests", "benchmarks", "pyro_bnn"} - OPTIONAL
    providers = importlib.metadata.packages_distributions()
    wanted = {providers[name][0].lower() for name in third_party}
    assert wanted <= declared(), wanted - declared()
