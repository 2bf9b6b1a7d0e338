"""Programs do not grow unnoticed: the time of a first call grows with their instructions."""

import jax
import pytest

from tests.hlo_lines import count, first_calls

pytestmark = pytest.mark.full

#: As `python -m tests.hlo_lines` prints them, with jaxlib 0.10.2.
INSTRUCTIONS = {
    "recall of vectors": 561,
    "step of vectors": 248,
    "recall of Gaussians": 1657,
    "step of Gaussians": 1415,
    "recall of clouds": 5182,
    "step of clouds": 4131,
    "recalls of a batch": 2394,
    "recall with Certified": 4876,
    "gradient of a recall": 3874,
    "suggest_beta": 1722,
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the numbers are those on CPUs")
def test_programs_do_not_grow():
    grown = []
    calls = {name: rest for name, *rest in first_calls()}
    assert set(calls) == set(INSTRUCTIONS)
    for name, (function, arguments) in calls.items():
        number = count(function, *arguments)
        if number > 1.1 * INSTRUCTIONS[name]:
            before = INSTRUCTIONS[name]
            grown.append(f"{name}: from {before} to {number}, {number / before - 1:+.0%}")
    assert not grown, "\n".join(grown)
