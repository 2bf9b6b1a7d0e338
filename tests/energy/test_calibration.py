"""Prediction sets keep their promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam


def draw(rng, points, num):
    """Queries about patterns drawn at random, with noise that Gibbs weights do not know of."""
    owner = rng.integers(len(points), size=num)
    noise = rng.standard_t(3, size=(num, points.shape[1]))
    return points[owner] + 0.6 * noise, owner


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(2)
    points = rng.normal(size=(12, 3))
    memory = jdam.store(points)
    queries, owner = draw(rng, points, 400)
    calibration = jdam.calibrate(memory, queries, owner, 3.0)
    return points, memory, calibration, (queries, owner), draw(rng, points, 1000)


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_sets_hold_the_pattern_as_often_as_promised(drawn, coverage):
    _, _, calibration, _, (queries, owner) = drawn
    sets = jax.vmap(calibration.prediction_set, (0, None))(queries, 1 - coverage)
    held = np.asarray(sets)[np.arange(len(owner)), owner].mean()
    assert abs(held - coverage) < 0.04  # two standard errors of 400 and 1000 draws
    assert sets.sum(1).mean() < 8


def test_by_hand(drawn):
    points, _, calibration, (queries, owner), (new, _) = drawn

    def scores(queries):
        logits = -3.0 * np.square(queries[:, None] - points[None]).sum(-1)
        return np.log(np.exp(logits).sum(1, keepdims=True)) - logits

    own = np.sort(scores(queries)[np.arange(400), owner])
    np.testing.assert_allclose(calibration.scores, own, rtol=1e-9, atol=1e-12)
    limit = own[int(np.ceil(401 * 0.9)) - 1]
    np.testing.assert_array_equal(
        calibration.prediction_set(new[0], 0.1), scores(new[:1])[0] <= limit
    )
    assert calibration.prediction_set(new[0], 1e-3).all()  # more than 400 queries can promise
    least = lambda queries: np.square(queries[:, None] - points[None]).sum(-1).min(1)  # noqa: E731
    p = (1 + (least(queries) >= least(new[:1])).sum()) / 401
    np.testing.assert_allclose(calibration.p_value(new[0]), p)


def test_p_values_are_uniform_and_small_for_strangers(drawn):
    _, _, calibration, _, (queries, _) = drawn
    p = np.asarray(jax.vmap(calibration.p_value)(queries))
    for alpha in (0.1, 0.5):
        assert abs((p <= alpha).mean() - alpha) < 0.06
    assert calibration.p_value(np.full(3, 30.0)) == 1 / 401


def test_classes(drawn):
    _, memory, _, (queries, owner), (new, truth) = drawn
    names = np.array(["a", "b", "c"])[np.arange(12) % 3]
    found = jdam.calibrate(memory, queries, names[owner], 3.0, pattern_labels=names)
    sets = np.asarray(jax.vmap(found.prediction_set, (0, None))(new, 0.2))
    for name in "abc":
        marks = sets[:, names == name]
        assert (marks == marks[:, :1]).all()
    assert abs(sets[np.arange(1000), truth].mean() - 0.8) < 0.05
    weights = np.asarray(jdam.gibbs_weights(memory, new[0], 3.0))
    of_class = -np.log(weights[names == names[0]].sum())
    alone = jdam.calibrate(memory, new[:1], names[:1], 3.0, pattern_labels=names)
    np.testing.assert_allclose(alone.scores[0], of_class, rtol=1e-9)


def test_mistakes_are_named(drawn):
    points, memory, calibration, (queries, owner), _ = drawn
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\); got 1"):
        calibration.prediction_set(points[0], 1.0)
    with pytest.raises(ValueError, match=r"targets must have shape \(Q,\) = \(400,\)"):
        jdam.calibrate(memory, queries, owner[:3], 3.0)
    with pytest.raises(ValueError, match="labels must be among those of the patterns; got 7"):
        jdam.calibrate(memory, queries[:1], [7], 3.0, pattern_labels=np.zeros(12, int))
    with pytest.raises(ValueError, match=r"pattern_labels must have shape \(N,\) = \(12,\)"):
        jdam.calibrate(memory, queries[:1], [0], 3.0, pattern_labels=np.zeros(3, int))


@pytest.fixture(scope="module")
def many():
    """Of a memory large enough for bounds to leave something out."""
    rng = np.random.default_rng(3)
    means, factors = 3 * rng.normal(size=(600, 3)), rng.normal(size=(600, 3, 3))

    def ask(num):
        owner = rng.integers(600, size=num)
        factor = factors[owner] + 0.1 * rng.normal(size=(num, 3, 3))
        return jdam.Gaussian(means[owner] + 0.5 * rng.standard_t(3, size=(num, 3)), factor), owner

    return jdam.store(jdam.Gaussian(means, factors)), ask(200), ask(400)


def scores_by_hand(memory, queries, beta, classes=None):
    """−log w, of patterns or summed over classes, and the least divergence."""
    divergences = np.asarray(jdam.pairwise(memory, queries), np.longdouble)
    weights = np.exp(-beta * (divergences - divergences.min(1, keepdims=True)))
    weights /= weights.sum(1, keepdims=True)
    if classes is not None:
        weights = weights @ (classes[:, None] == classes[None])
    scores = -np.log(np.maximum(weights, np.longdouble("1e-4000")))
    return scores.astype(float), divergences.min(1).astype(float)


class Plain(jdam.Euclidean):
    """Without bounds."""

    def bounds(self, patterns):
        return ()


PROVED = jdam.Certified(tol=1e-6)
CUT_SHORT = jdam.Certified(4, max_candidates=4, tol=1e-6)  # often proves little


@pytest.mark.full
@pytest.mark.parametrize(
    ("search", "coverage", "by_class"), [(PROVED, 0.8, False), (CUT_SHORT, 0.95, True)]
)
def test_certified_sets_hold_the_exhaustive_ones(many, search, coverage, by_class):
    memory, (queries, owner), (new, truth) = many
    classes = np.arange(600) % 7 if by_class else None
    given = {"pattern_labels": classes} if by_class else {}
    targets = classes[owner] if by_class else owner
    found = jdam.calibrate(memory, queries, targets, 1.0, search=search, **given)
    sets = np.asarray(jax.vmap(found.prediction_set, (0, None))(new, 1 - coverage))
    assert sets[np.arange(400), truth].mean() > coverage - 0.05

    own = scores_by_hand(memory, queries, 1.0, classes)[0][np.arange(200), owner]
    assert (found.scores >= np.sort(own) - 1e-9).all()
    exhaustive = jdam.calibrate(memory, queries, targets, 1.0, search=jdam.Exhaustive(), **given)
    np.testing.assert_allclose(exhaustive.scores, np.sort(own), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.distances, exhaustive.distances, rtol=1e-9)
    limit = np.sort(own)[int(np.ceil(201 * coverage - 1e-6)) - 1]
    wanted = scores_by_hand(memory, new, 1.0, classes)[0] <= limit
    assert not (wanted & ~sets).any()
    if search.max_candidates is None and not by_class:
        # What the certificate allows: two times −log(1 − tol), about 2e-6, at the edge.
        np.testing.assert_allclose(found.scores, np.sort(own), atol=1.1e-6, rtol=1e-9)
        edge = scores_by_hand(memory, new, 1.0)[0] <= limit + 2.2e-6
        assert not (sets & ~edge).any()


@pytest.mark.full
def test_certified_p_values_are_the_exhaustive_ones(many):
    memory, (queries, owner), (new, _) = many
    by_all, by_few = (
        jdam.calibrate(memory, queries, owner, 1.0, search=search)
        for search in (jdam.Exhaustive(), jdam.Certified())
    )
    _, least = scores_by_hand(memory, new[:40], 1.0)
    _, known = scores_by_hand(memory, queries, 1.0)
    wanted = (1 + (known[None] >= least[:, None] - 1e-12).sum(1)) / 201
    for calibration in (by_all, by_few):
        p = jax.vmap(calibration.p_value)(new[:40])
        np.testing.assert_allclose(p, wanted, atol=1e-12)


@pytest.mark.full
def test_an_owner_that_was_not_compared_has_a_finite_score(many):
    """A query at another pattern than its own: the search has no reason to look at that."""
    memory, _, _ = many
    search = jdam.Certified(4, max_candidates=4)
    found = jdam.calibrate(memory, memory[:1], np.array([599]), 1.0, search=search)
    divergences = np.asarray(jdam.divergences(memory, memory[0]))
    exact = np.log(np.exp(-divergences).sum()) + divergences[599]
    assert exact - 1e-9 <= found.scores[0] < exact + 3


@pytest.mark.full
def test_which_search(many, drawn):
    memory, (queries, owner), _ = many
    points, small, *_ = drawn
    assert isinstance(jdam.calibrate(memory, queries[:3], owner[:3], 1.0).search, jdam.Certified)
    assert jdam.calibrate(small, points, np.arange(12), 1.0).search == jdam.Exhaustive()
    plain = jdam.calibrate(
        jdam.store(points, Plain()), points, np.arange(12), 1.0, search=jdam.Certified()
    )
    assert plain.search == jdam.Exhaustive()
    with pytest.raises(TypeError, match="search must be .*; got 'all'"):
        jdam.calibrate(small, points, np.arange(12), 1.0, search="all")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_ranks_of_halves(rng, dtype):
    """⌈301·0.997⌉ = 301 exceeds n = 300, so that the set is everything."""
    patterns = jnp.asarray(rng.normal(size=(4, 2)), dtype)
    queries, targets = jnp.tile(patterns, (75, 1)), np.tile(np.arange(4), 75)
    calibration = jdam.calibrate(jdam.store(patterns), queries, targets, 50.0)
    assert calibration.prediction_set(patterns[0], 0.003).all()
    assert calibration.prediction_set(patterns[0], 0.01).sum() == 1
    np.testing.assert_allclose(calibration.p_value(patterns[0]), 1)
