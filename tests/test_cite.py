"""The papers behind what is in use."""

import numpy as np
import pytest

import jdam
from tests.cases import KINDS, every_kind


@every_kind
def test_every_kind_has_a_paper(rng, kind):
    make, geometry = KINDS[kind]
    memory = jdam.store(make(rng, 3, 2), geometry)
    found = jdam.cite(memory)
    if not type(memory.geometry).__module__.startswith("jdam"):
        assert found == ""
        return
    assert found.startswith("@article{")
    assert found.count("@article{") == found.count("journal") == found.count("\n}")


def test_what_else_is_used_is_cited_once():
    memory = jdam.store(jdam.PointCloud(np.eye(3)[None]), jdam.Sinkhorn(0.1, rho=1.0))
    found = jdam.cite(memory, jdam.Entmax(2.0), jdam.Anderson(), jdam.Anderson(5), jdam.Unrolled())
    for number in ("2603.20656", "1910.12958", "1905.05702"):
        assert found.count(number) == 1
    assert found.count("@article{") == 4
    with pytest.raises(TypeError, match="memory must be a jdam.Memory"):
        jdam.cite(memory.geometry)
