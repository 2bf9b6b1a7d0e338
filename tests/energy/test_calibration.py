"""Prediction sets keep their promise."""

import jax
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
