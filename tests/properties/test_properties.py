# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Each property on random programs: what is answered is right, what is not answered is refused by name."""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from tests.properties.checks import PROPERTIES, check
from tests.properties.generator import Spec, draw_spec, spec_of_seed

#: no shrinking: a program is named by its choices, of which the plain ones are not printed
SETTINGS = settings(
    max_examples=34,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@st.composite
def specs(draw: Any) -> Spec:
    return draw_spec(lambda name, options: draw(st.sampled_from(options)))


@pytest.mark.parametrize("name", list(PROPERTIES))
def test_property(name: str) -> None:
    @SETTINGS
    @given(specs())
    def holds(spec: Spec) -> None:
        found = check(spec, name, most=2)
        note(str(spec))
        wrong = {o: str(v) for o, v in found.items() if not v.is_right}
        assert not wrong, wrong

    holds()


def test_a_seed_is_a_program() -> None:
    assert spec_of_seed(3) == spec_of_seed(3)
    assert len({spec_of_seed(i) for i in range(50)}) == 50
