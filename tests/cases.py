"""The kinds of memories that all suites share: a new geometry adds a line."""

from functools import partial

import jax
import numpy as np
import pytest

import jdam
from tests.helpers import clouds, diagonals, gaussians, mixtures, near, vectors
from tests.outside import Cramer, SlicedWasserstein, directions, even_clouds, histograms

KINDS = {
    "gaussian": (gaussians, jdam.Bures()),
    "low rank": (partial(gaussians, rank=2), jdam.Bures()),
    "diagonal": (diagonals, jdam.Bures()),
    "entropic": (gaussians, jdam.EntropicBures(0.3)),
    "entropic, low rank": (partial(gaussians, rank=2), jdam.EntropicBures(0.3)),
    "entropic, diagonal": (diagonals, jdam.EntropicBures(0.3)),
    "euclidean": (vectors, jdam.Euclidean()),
    "dot product": (vectors, jdam.DotProduct()),
    "mixtures": (partial(mixtures, rank=2), jdam.MixtureWasserstein()),
    "clouds": (clouds, jdam.Sinkhorn(0.5, hellinger_scale=0.2)),
    "one-sided": (clouds, jdam.Chamfer(0.5, rho=0.8, hellinger_scale=0.2)),
    "sliced, from outside": (even_clouds, SlicedWasserstein(directions(2))),
    "histograms, from outside": (histograms, Cramer()),
}
#: Those whose D vanishes between equals only, and whose full steps end at patterns.
METRIC = ["gaussian", "low rank", "diagonal", "euclidean"]


def only_full(*values):
    """Parameters of the full tier."""
    return [
        pytest.param(*value if isinstance(value, tuple) else (value,), marks=pytest.mark.full)
        for value in values
    ]


every_kind = pytest.mark.parametrize("kind", KINDS)
#: One of each way to compare, move and hold measures; those left out differ from one of these in
#: ranks and shapes alone.
DISTINCT = [
    kind
    for kind in KINDS
    if kind not in ("low rank", "entropic", "entropic, diagonal", "histograms, from outside")
]
#: Tests of every kind are the conformance suite; elsewhere the quick ones take a few.
FEW = ["gaussian", "euclidean"]
every_kind_in_full = pytest.mark.parametrize(
    "kind", [*FEW, *only_full(*(kind for kind in DISTINCT if kind not in FEW))]
)
#: Of weights that sum to 1.
WEIGHTED = ["mixtures", "clouds"]
#: Programs on clouds take seconds to compile, and their weights cannot be varied one by one:
#: what these tests say of them is tested along the simplex in test_sinkhorn, test_entropic and
#: test_mixture.
quick_kinds = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WEIGHTED])
#: One of each way to compare and move, where a kind makes no other difference.
some_and_clouds = pytest.mark.parametrize(
    "kind", ["gaussian", "entropic, low rank", "euclidean", "clouds", "one-sided"]
)
#: Where what is done with divergences and pulls is tested, not how they come about.
gaussians_and_clouds = pytest.mark.parametrize("kind", ["gaussian", "clouds"])
metric_kinds = pytest.mark.parametrize("kind", METRIC)


def problem(rng, kind, num=7, d=5, dtype=np.float64, off=0.1):
    """A memory, and a query near its third pattern. Programs on matrices of up to 4 rows, which
    jdam decomposes itself, take longer to compile; those of low rank are among them."""
    make, geometry = KINDS[kind]
    memory = jdam.store(make(rng, num, d, dtype=dtype), geometry)
    return memory, near(rng, memory[2], off)


def close(first, second, **tolerance):
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def alike(first, second, **tolerance):
    """Equal as measures: factors up to rotation."""
    if isinstance(first, jdam.Gaussian):
        first, second = (first.mean, first.covariance), (second.mean, second.covariance)
    if isinstance(first, jdam.GaussianMixture):
        first, second = (
            (m.weights, m.components.mean, m.components.covariance) for m in (first, second)
        )
    close(first, second, **tolerance)


@jax.jit
def all_of(memory, query, beta):
    """In one program."""
    return (
        jdam.divergences(memory, query),
        jdam.energy(memory, query, beta),
        jdam.gibbs_weights(memory, query, beta),
        jdam.step(memory, query, beta),
    )
