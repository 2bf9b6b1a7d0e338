"""What is computed once of patterns is the same part by part."""

import jax
import pytest

import jdam
from jdam._memory import prepared
from jdam.geometry.protocol import BatchSizes
from tests.cases import KINDS, close
from tests.helpers import vectors


@pytest.mark.full
@pytest.mark.parametrize("kind", ["gaussian", "mixtures", "clouds"])
def test_parts_are_one_program(rng, monkeypatch, capsys, kind):
    make, geometry = KINDS[kind]
    patterns = make(rng, 11, 3)
    wanted = jax.jit(lambda p: jdam.store(p, geometry))(patterns)
    sizes = BatchSizes(1, 1, 1)
    monkeypatch.setattr(type(geometry), "batch_sizes", lambda self, patterns: sizes)
    monkeypatch.setattr(prepared, "BLOCKS", 3)
    found = jdam.store(patterns, geometry, progress=True)
    close(found, wanted, rtol=1e-12, atol=1e-12)
    assert "store: 100%" in capsys.readouterr().err
    jdam.store(patterns, geometry)
    assert capsys.readouterr().err == ""


def test_progress_is_checked(rng):
    with pytest.raises(TypeError, match="progress must be True, False or None; got 0"):
        jdam.store(vectors(rng, 4, 2), progress=0)
