# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Every cell is exact, or refused by name where the list says so."""

import pytest

from tests.programs.matrix import load, run
from tests.programs.page import FAILING, REFUSED, read

PROGRAMS = load()


def test_there_are_many_programs() -> None:
    assert len(PROGRAMS) >= 80
    assert all(name in PROGRAMS for name, _ in read(REFUSED) | read(FAILING))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_cell_is_exact_or_refused_by_name(name: str) -> None:
    found = run(PROGRAMS[name])
    refused = {o for p, o in read(REFUSED) if p == name}
    failing = {o for p, o in read(FAILING) if p == name}
    wrong = {o: str(v) for o, v in found.items() if not v.is_right and o not in failing}
    assert not wrong, wrong
    new = {o: str(v) for o, v in found.items() if v.outcome == "refused" and o not in refused | failing}
    assert not new, f"refused now, exact before: {new}"
    mended = sorted(o for o in failing if o not in found or found[o].is_right)
    assert not mended, f"mended: take it out of failing.txt: {mended}"
