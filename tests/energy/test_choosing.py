"""A β from data: its recall rate, its likelihood, and its unit."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

import jdam
from jdam._energy import choosing
from jdam._energy import pairs as module
from jdam.geometry.protocol import BatchSizes
from tests.cases import only_full
from tests.helpers import clouds, gaussians, near, vectors

MAKES = {
    "gaussians": (gaussians, lambda unit: jdam.Bures()),
    "vectors": (vectors, lambda unit: jdam.Euclidean()),
    "clouds": (clouds, lambda unit: jdam.Sinkhorn(0.3 * unit**2)),
    "unbalanced": (clouds, lambda unit: jdam.Sinkhorn(0.3 * unit**2, rho=unit**2)),
}


def scaled(measures, unit):
    if isinstance(measures, jdam.PointCloud):
        return jdam.PointCloud(unit * measures.points, measures.weights)
    return jax.tree.map(lambda leaf: unit * leaf, measures)


def setting(rng, kind, unit=1.0, off=0.3):
    make, geometry = MAKES[kind]
    patterns = make(rng, 12, 3)
    targets = np.arange(24) % 12
    queries = near(rng, jax.tree.map(lambda leaf: leaf[targets], patterns), off)
    return jdam.store(scaled(patterns, unit), geometry(unit)), scaled(queries, unit), targets


@pytest.mark.full
@pytest.mark.parametrize("kind", ["gaussians", "vectors"])
def test_recall_is_right_as_often_as_the_nearest_neighbour(rng, kind):
    memory, queries, targets = setting(rng, kind)
    nearest = np.asarray(jdam.pairwise(memory, queries)).argmin(1)
    for args in ((), (queries,), (queries, targets)):
        beta = jdam.suggest_beta(memory, *args)
        found = np.asarray(jdam.recall_batch(memory, queries, beta, max_steps=8).nearest)
        assert (found == targets).mean() >= (nearest == targets).mean() - 0.05


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "unit"), [("gaussians", 1e-5), ("vectors", 1e5), ("clouds", 1e5), ("unbalanced", 1e-5)]
)
def test_it_follows_the_unit_of_length(kind, unit):
    one = setting(np.random.default_rng(1), kind)
    other = setting(np.random.default_rng(1), kind, unit)
    for number in (1, 2, 3):
        beta = jdam.suggest_beta(*other[:number]) * unit**2
        np.testing.assert_allclose(beta, jdam.suggest_beta(*one[:number]), rtol=1e-4)


def test_what_it_promises(rng):
    memory, queries, _ = setting(rng, "gaussians")
    for beta, measures in (
        (jdam.suggest_beta(memory), memory.patterns),
        (jdam.suggest_beta(memory, queries), queries),
    ):
        weights = jax.vmap(jdam.gibbs_weights, (None, 0, None))(memory, measures, beta)
        assert (weights.max(1) >= 0.99 - 1e-9).mean() >= 0.9
        weights = jax.vmap(jdam.gibbs_weights, (None, 0, None))(memory, measures, beta / 4)
        assert (weights.max(1) >= 0.99).mean() < 0.9


@pytest.mark.full
@pytest.mark.parametrize("off", [0.3, 1.5])
def test_the_likeliest(rng, off):
    memory, queries, targets = setting(rng, "gaussians", off=off)
    divergences = np.asarray(jdam.pairwise(memory, queries))
    own = divergences[np.arange(24), targets]

    def loss(log_beta):
        beta = np.exp(log_beta)
        return (beta * own + logsumexp(-beta * divergences, axis=1)).mean()

    found = float(jdam.suggest_beta(memory, queries, targets))
    best = minimize_scalar(loss, bounds=(-12, 12), method="bounded", options={"xatol": 1e-10})
    assert loss(np.log(found)) <= max(best.fun, 1e-4) + 1e-9
    if best.fun > 1e-2:
        np.testing.assert_allclose(found, np.exp(best.x), rtol=1e-4)


@pytest.mark.full
def test_it_never_fails(rng):
    patterns = vectors(rng, 6, 2)
    same = jdam.store(jnp.ones((4, 2)))
    np.testing.assert_allclose(jdam.suggest_beta(same), 0.5)
    np.testing.assert_allclose(jdam.suggest_beta(same, jnp.ones((2, 2)), [0, 1]), 0.5)
    assert jdam.suggest_beta(jdam.store(jnp.zeros((1, 2)))) == 1
    memory = jdam.store(patterns)
    twice = jdam.store(jnp.concatenate([patterns, patterns]))
    np.testing.assert_allclose(jdam.suggest_beta(twice), jdam.suggest_beta(memory), rtol=0.3)
    wrong = jdam.suggest_beta(memory, patterns, np.roll(np.arange(6), 1))
    assert 0 < wrong < 1e-3
    off = jdam.store(
        jnp.concatenate([patterns, patterns + 1e-3]), log_prior=[0.0] * 6 + [-np.inf] * 6
    )
    np.testing.assert_allclose(
        jdam.suggest_beta(off, patterns), jdam.suggest_beta(memory, patterns)
    )
    roomy = jdam.store(patterns, capacity=9)
    np.testing.assert_allclose(jdam.suggest_beta(roomy), jdam.suggest_beta(memory), rtol=1e-12)
    targets = np.arange(6)
    for held in (memory, roomy):
        close = jdam.suggest_beta(held, patterns + 0.1, targets)
        np.testing.assert_allclose(
            close, jdam.suggest_beta(jdam.store(patterns), patterns + 0.1, targets)
        )


@pytest.mark.full
def test_duplicates_and_patterns_that_are_off(rng):
    patterns = vectors(rng, 8, 2)
    memory = jdam.store(patterns)
    twice = jdam.store(jnp.concatenate([patterns, patterns[:2]]))
    args = patterns + 0.01, np.arange(8)
    np.testing.assert_allclose(
        jdam.suggest_beta(twice, *args), jdam.suggest_beta(memory, *args), rtol=0.05
    )
    off = jdam.store(patterns, log_prior=[0.0] * 7 + [-np.inf])
    np.testing.assert_allclose(
        jdam.suggest_beta(off), jdam.suggest_beta(jdam.store(patterns[:7])), rtol=1e-12
    )
    for held in (memory, jdam.store(patterns, capacity=11)):
        found = jdam.suggest_beta(held, args[0], args[1] - 8)
        np.testing.assert_allclose(found, jdam.suggest_beta(memory, *args), rtol=1e-12)
    with pytest.raises(ValueError, match="queries must be at finite divergences"):
        jdam.suggest_beta(memory, patterns * np.nan)
    with pytest.raises(ValueError, match="queries must hold at least one query; got 0"):
        jdam.suggest_beta(memory, patterns[:0])


def test_a_prior_counts(rng):
    """Of a rival that is e⁸ times likelier, β has to outweigh that too."""
    patterns = vectors(rng, 2, 2)
    gap = jdam.pairwise(jdam.store(patterns))[0, 1]
    memory = jdam.store(patterns, log_prior=[0.0, 8.0])
    beta = jdam.suggest_beta(memory, patterns[:1])
    np.testing.assert_allclose(jdam.gibbs_weights(memory, patterns[0], beta)[0], 0.99, rtol=1e-6)
    np.testing.assert_allclose(beta * gap, 8 + np.log(99), rtol=1e-6)


def test_it_says_why(rng, caplog):
    memory, queries, targets = setting(rng, "vectors")
    with caplog.at_level(logging.DEBUG, "jdam"):
        jdam.suggest_beta(memory)
        jdam.suggest_beta(memory, queries, targets)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.endswith("separates 95 % of 12 patterns from the other patterns")
    assert second.endswith("is the likeliest for targets")


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (lambda q: (None, [0]), ValueError, "targets or labels need queries"),
        (lambda q: (q, [0]), ValueError, r"targets must have shape \(Q,\) = \(24,\); got \(1,\)"),
        (lambda q: (q, [0.5] * 24), TypeError, "targets must be integers"),
        (lambda q: (q, [12] * 24), IndexError, "index 12 is out of range"),
        (lambda q: (q, [3] * 24), ValueError, "targets must be switched on .*; pattern 3 is off"),
        (lambda q: (q[0],), ValueError, r"queries must have shape \(N, d\)"),
    ],
)
def test_bad_arguments_are_named(rng, args, error, message):
    memory, queries, _ = setting(rng, "vectors")
    prior = np.zeros(12)
    prior[3] = -np.inf
    memory = jdam.store(memory.patterns, log_prior=prior)
    with pytest.raises(error, match=message):
        jdam.suggest_beta(memory, *args(queries))
    with pytest.raises(TypeError, match="memory must be a jdam.Memory"):
        jdam.suggest_beta(memory.patterns)


@pytest.mark.full
@pytest.mark.parametrize("num", [256, 257, 3000])
def test_few_stand_for_many(rng, monkeypatch, num):
    """All of up to 256, of more 24, the same ones each time, compared with all."""
    asked, found = [], choosing.pairs

    def pairs(memory, queries, *args):
        asked.append(np.asarray(queries))
        return found(memory, queries, *args)

    monkeypatch.setattr(choosing, "pairs", pairs)
    patterns = vectors(rng, num, 8)
    memory = jdam.store(patterns)
    beta = jdam.suggest_beta(memory)
    assert beta == jdam.suggest_beta(memory)
    first, again = asked
    np.testing.assert_array_equal(first, again)
    assert len(first) == (num if num <= 256 else 24)
    distances = ((np.asarray(patterns)[:, None] - np.asarray(patterns)) ** 2).sum(-1)
    told_apart = (1 / np.exp(-float(beta) * distances).sum(1) >= 0.99).mean()
    # 5 % is the standard error of what 24 say.
    assert 0.75 < told_apart <= 1 if num > 256 else 0.93 < told_apart < 0.97


@pytest.mark.full
def test_those_asked_are_spread_and_on():
    prior = np.where(np.arange(2400) % 2 == 0, 0.0, -np.inf)
    chosen = choosing._sample(2400, jnp.asarray(prior))
    assert (chosen % 2 == 0).all()
    np.testing.assert_array_equal(chosen // 100, np.arange(24))


def test_it_shows_its_progress(rng, monkeypatch, capsys):
    memory = jdam.store(vectors(rng, 40, 3))
    beta = jdam.suggest_beta(memory)
    monkeypatch.setattr(module, "PRODUCTS", 4)
    monkeypatch.setattr(jdam.Euclidean, "batch_sizes", lambda self, patterns: BatchSizes(2, 5, 5))
    np.testing.assert_allclose(jdam.suggest_beta(memory, progress=True), beta, rtol=1e-12)
    assert "suggest_beta: 100%" in capsys.readouterr().err
    jdam.suggest_beta(memory)
    assert capsys.readouterr().err == ""


def test_the_likeliest_for_labels(rng):
    """A β at which the mean of −log Σ w over the class is least."""
    points = rng.normal(size=(12, 2))
    names = np.array(["north", "south"])[(points[:, 1] < 0).astype(int)]
    memory = jdam.store(points)
    queries = rng.normal(size=(30, 2))
    labels = np.array(["north", "south"])[
        (queries[:, 1] + 0.5 * rng.normal(size=30) < 0).astype(int)
    ]
    beta = float(jdam.suggest_beta(memory, queries, labels=labels, pattern_labels=names))

    def loss(beta):
        weights = np.asarray(jax.vmap(lambda q: jdam.gibbs_weights(memory, q, beta))(queries))
        return -np.log((weights * (names[None] == labels[:, None])).sum(1)).mean()

    assert loss(beta) <= min(loss(beta * factor) for factor in np.logspace(-2, 2, 41)) + 1e-9
    numbered = jdam.store(points, values=(names == "south").astype(int))
    again = jdam.suggest_beta(numbered, queries, labels=(labels == "south").astype(int))
    np.testing.assert_allclose(again, beta, rtol=1e-9)


def test_labels_are_checked(rng):
    memory = jdam.store(rng.normal(size=(3, 2)))
    queries = rng.normal(size=(2, 2))
    with pytest.raises(ValueError, match="labels need pattern_labels"):
        jdam.suggest_beta(memory, queries, labels=[0, 1])
    with pytest.raises(ValueError, match="give one of them"):
        jdam.suggest_beta(memory, queries, [0, 1], labels=[0, 1], pattern_labels=[0, 1, 1])
    with pytest.raises(ValueError, match="labels must be among those of the patterns; got 2"):
        jdam.suggest_beta(memory, queries, labels=[0, 2], pattern_labels=[0, 1, 1])
    with pytest.raises(ValueError, match="targets or labels need queries"):
        jdam.suggest_beta(memory, labels=[0, 1], pattern_labels=[0, 1, 1])


def separate(rng, num):
    """Vectors of four classes, each about a centre, some of which are nearer to another's."""
    classes = np.arange(num) % 4
    centres = 3.0 * np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    return centres[classes] + rng.normal(size=(num, 2)), np.array(list("abcd"), "U5")[classes]


@pytest.mark.parametrize("num", [40, *only_full(500)])
def test_the_likeliest_for_classes_of_the_patterns_alone(rng, num):
    """Each pattern asked of all others."""
    patterns, labels = separate(rng, num)
    labels[0] = "alone"
    distances = np.square(patterns[:, None] - patterns[None]).sum(-1)
    np.fill_diagonal(distances, np.inf)
    same = labels[:, None] == labels[None]

    def loss(log_beta):
        logits = -np.exp(log_beta) * distances
        return (logsumexp(logits, axis=1) - logsumexp(logits, axis=1, b=same))[1:].mean()

    found = float(jdam.suggest_beta(jdam.store(patterns), pattern_labels=labels))
    best = minimize_scalar(loss, bounds=(-8, 8), method="bounded", options={"xatol": 1e-10})
    assert best.fun > 1e-2
    if num <= 256:
        np.testing.assert_allclose(found, np.exp(best.x), rtol=1e-4)
    else:  # of which 256 are asked
        assert loss(np.log(found)) < 1.05 * best.fun


@pytest.mark.full
def test_classes_that_say_nothing_about_the_patterns(rng):
    patterns, labels = separate(rng, 12)
    memory = jdam.store(patterns)
    alone = jdam.suggest_beta(memory)
    for classes in (np.arange(12), np.zeros(12)):
        assert jdam.suggest_beta(memory, pattern_labels=classes) == alone
    with pytest.raises(ValueError, match=r"pattern_labels must have shape \(N,\) = \(12,\); got"):
        jdam.suggest_beta(memory, pattern_labels=labels[:3])
    with pytest.raises(ValueError, match="targets or labels need queries"):
        jdam.suggest_beta(memory, labels=labels, pattern_labels=labels)
    roomy = jdam.store(patterns, capacity=20)
    np.testing.assert_allclose(
        jdam.suggest_beta(roomy, pattern_labels=labels),
        jdam.suggest_beta(memory, pattern_labels=labels),
        rtol=1e-9,
    )


@pytest.mark.parametrize("unit", [1.0, 1e3])
def test_the_divergence_between_neighbours(rng, unit):
    patterns = unit * rng.normal(size=(30, 3))
    distances = np.square(patterns[:, None] - patterns[None]).sum(-1)
    np.fill_diagonal(distances, np.inf)
    found = jdam.neighbour_divergence(jdam.store(patterns))
    np.testing.assert_allclose(found, np.median(distances.min(1)), rtol=1e-9)


@pytest.mark.full
def test_the_divergence_between_neighbours_of_special_memories(rng):
    patterns = rng.normal(size=(20, 3))
    found = jdam.neighbour_divergence(jdam.store(patterns))
    twice = jdam.store(np.concatenate([patterns, patterns]))
    np.testing.assert_allclose(jdam.neighbour_divergence(twice), found, rtol=1e-9)
    roomy = jdam.store(patterns, capacity=30)
    np.testing.assert_allclose(jdam.neighbour_divergence(roomy), found, rtol=1e-9)
    off = jdam.store(
        np.concatenate([patterns, patterns + 1e-3]), log_prior=[0.0] * 20 + [-np.inf] * 20
    )
    np.testing.assert_allclose(jdam.neighbour_divergence(off), found, rtol=1e-9)
    same = jdam.store(np.ones((4, 2)))
    np.testing.assert_allclose(jdam.neighbour_divergence(same), 1 / jdam.suggest_beta(same))


@pytest.mark.full
def test_the_divergence_between_neighbours_of_many_is_of_some(rng):
    patterns = rng.normal(size=(3000, 16))
    memory = jdam.store(patterns)
    _, second = jax.vmap(lambda query: jdam.nearest(memory, query, 2))(patterns)
    exact = np.median(second[:, 1])
    np.testing.assert_allclose(jdam.neighbour_divergence(memory), exact, rtol=0.25)
    assert jdam.neighbour_divergence(memory) == jdam.neighbour_divergence(memory)


def test_halves_have_a_finite_beta(rng):
    patterns = (0.002 * rng.normal(size=(8, 3))).astype(np.float16)
    memory = jdam.store(patterns)
    beta = jdam.suggest_beta(memory)
    assert beta.dtype == np.float32
    assert np.isfinite(beta)
    assert beta > float(np.finfo(np.float16).max)
    assert jdam.recall(memory, patterns[2], beta).nearest == 2


def test_labels_that_are_off(rng):
    log_prior = np.array([0.0, 0.0, -np.inf])
    memory = jdam.store(rng.normal(size=(3, 2)), log_prior=log_prior, values=np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="labels must be of patterns that the prior leaves on"):
        jdam.suggest_beta(memory, memory.patterns, labels=[0, 1, 2])
