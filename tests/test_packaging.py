# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pyro_bnn

ROOT = Path(__file__).parents[1]
#: Packages without which tests are skipped.
OPTIONAL = {"lightning", "blackjax", "jax", "numpyro", "nutpie"}


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


def test_importing_the_package_loads_no_library_of_a_single_function() -> None:
    """A fresh process pays for torch and Pyro; what single functions need is imported where they run."""
    faces = "pyro_bnn, pyro_bnn.nn, pyro_bnn.infer, pyro_bnn.infer.autoguide, pyro_bnn.infer.hfl, pyro_bnn.diagnostics"
    heavy = ["scipy.stats", "xarray", "arviz", "pandas", "matplotlib"]
    code = f"import {faces}, sys; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_the_package_exports_what_the_tutorials_use_most() -> None:
    nodes = [
        node for path in (ROOT / "tutorials").glob("*.py") for node in ast.walk(ast.parse(path.read_text()))
    ]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    used = Counter(
        alias.name for node in imports if (node.module or "").startswith("pyro_bnn") for alias in node.names
    )
    assert {name for name, _ in used.most_common(20)} <= set(pyro_bnn.__all__)
    assert pyro_bnn.__all__ == sorted(pyro_bnn.__all__)
    assert all(hasattr(pyro_bnn, name) for name in pyro_bnn.__all__)
