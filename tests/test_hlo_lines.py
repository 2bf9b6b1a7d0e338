"""Programs do not grow unnoticed: with their lines grows the time until a first call returns."""

import jax
import pytest

from tests.hlo_lines import count, first_calls

pytestmark = pytest.mark.full

#: As `python -m tests.hlo_lines` prints them, with jaxlib 0.10.2.
LINES = {
    "recall of vectors": 2983,
    "step of vectors": 2424,
    "recall of Gaussians": 5797,
    "step of Gaussians": 5271,
    "recall of clouds": 13023,
    "step of clouds": 10971,
    "recalls of a batch": 7504,
    "recall with Certified": 12901,
    "gradient of a recall": 7467,
    "suggest_beta": 4745,
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
