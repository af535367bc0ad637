# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Every cell is exact, or refused by name where the list says so."""

import pytest

from tests.programs.matrix import load, run
from tests.programs.operations import OPERATIONS
from tests.programs.page import FAILING, REFUSED, read

PROGRAMS = load()


def test_there_are_many_programs() -> None:
    assert len(PROGRAMS) >= 80
    assert all(name in PROGRAMS for name, _ in read(REFUSED) | read(FAILING))


def operations_of(name: str, fast: bool) -> list[str]:
    """
    The operations of a program in the fast tests, or those in the slow ones.

    Fast are the cells that may refuse, and those whose positions of program and operation add up to 2, 3 or 5 modulo 7: at
    least a third of the cells of every program and of every operation.
    """
    known = {o for p, o in read(REFUSED) | read(FAILING) if p == name}
    place = list(PROGRAMS).index(name)
    return [o for i, o in enumerate(OPERATIONS, place) if (o in known or i % 7 in (2, 3, 5)) == fast]


@pytest.mark.parametrize("part", ["fast", pytest.param("rest", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_cell_is_exact_or_refused_by_name(name: str, part: str) -> None:
    found = run(PROGRAMS[name], operations_of(name, part == "fast"))
    refused = {o for p, o in read(REFUSED) if p == name}
    failing = {o for p, o in read(FAILING) if p == name}
    wrong = {o: str(v) for o, v in found.items() if not v.is_right and o not in failing}
    assert not wrong, wrong
    new = {o: str(v) for o, v in found.items() if v.outcome == "refused" and o not in refused | failing}
    assert not new, f"refused now, exact before: {new}"
    # all cells of the list are in the fast part
    mended = sorted(o for o in failing if o not in found or found[o].is_right)
    assert part == "rest" or not mended, f"mended: take it out of failing.txt: {mended}"
