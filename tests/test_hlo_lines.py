"""Programs do not grow unnoticed: with their lines grows the time until a first call returns."""

import jax
import pytest

from tests.hlo_lines import count, first_calls

pytestmark = pytest.mark.full

#: As `python -m tests.hlo_lines` prints them, with jaxlib 0.10.2.
LINES = {
    "recall of vectors": 3004,
    "step of vectors": 1835,
    "recall of Gaussians": 5560,
    "step of Gaussians": 4280,
    "recall of clouds": 13173,
    "step of clouds": 11060,
    "recalls of a batch": 6840,
    "recall with Certified": 13300,
    "gradient of a recall": 6829,
    "suggest_beta": 4468,
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the lines are those on CPUs")
def test_programs_do_not_grow():
    grown = []
    calls = {name: rest for name, *rest in first_calls()}
    assert set(calls) == set(LINES)
    for name, (function, arguments) in calls.items():
        lines = count(function, *arguments)
        if lines > 1.1 * LINES[name]:
            grown.append(
                f"{name}: from {LINES[name]} to {lines} lines, {lines / LINES[name] - 1:+.0%}"
            )
    assert not grown, "\n".join(grown)
