"""Bounds hold on random cases, and are close to what they bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from jdam import theory
from tests.cases import only_full
from tests.helpers import clouds, diagonals, gaussians


def flat(rng, num, d):
    """Of rank 2, in factors of the same shape as full ones, so that programs are the same."""
    found = gaussians(rng, num, d, rank=2)
    return jdam.Gaussian(found.mean, np.pad(found.factor, ((0, 0), (0, 0), (0, d - 2))))


KINDS = {
    "full": gaussians,
    "low rank": flat,
    "diagonal": diagonals,
}
every_kind = pytest.mark.parametrize("kind", ["full", "diagonal", *only_full("low rank")])
NUM, DIM, CASES = 6, 5, 250


def pairwise(memory):
    """D of every pattern to every other, ∞ to itself."""
    found = jax.vmap(jdam.divergences, (None, 0))(memory, memory.patterns)
    return np.where(np.eye(len(memory), dtype=bool), np.inf, found)


def batch_of_problems(rng, kind, cases=CASES):
    """Patterns (cases, NUM), each case at its own scale, with queries at radii up to half the
    separation, and β from too small to large."""
    make = KINDS[kind]
    patterns = make(rng, cases * NUM, DIM)
    patterns = jax.tree.map(lambda leaf: leaf.reshape(cases, NUM, *leaf.shape[1:]), patterns)
    means = jax.tree.leaves(patterns)[0]
    spread = 10 ** rng.uniform(-1, 0.7, cases)
    shift = (spread - 1)[:, None, None] * means
    patterns = jax.tree.map(lambda leaf: leaf + shift if leaf is means else leaf, patterns)
    return patterns, rng.uniform(0, 0.6, cases), 10 ** rng.uniform(-0.5, 1.5, cases)


def first(patterns):
    return jax.tree.map(lambda leaf: leaf[0], patterns)


def examine(key, patterns, share, scaled):
    """One case: bounds about pattern 0, and what they bound."""
    memory = jdam.store(patterns)
    separation = theory.separations(memory)[0]
    radius, beta = share * separation, scaled / separation**2
    query = jdam.random.perturb(key, first(patterns), radius)
    other = jdam.random.perturb(jax.random.fold_in(key, 1), query, 1e-3 * radius)
    moved, other_moved = (jdam.step(memory, q, beta) for q in (query, other))

    def distance(first, second):
        alone = jdam.store(jax.tree.map(lambda leaf: leaf[None], first))
        return jnp.sqrt(jdam.divergences(alone, second)[0])

    ends = jdam.recall(memory, query, beta, max_steps=200)
    levels = jdam.divergences(memory, query)
    certificate = theory.certify(memory, query, beta)
    return {
        "separation": separation,
        "after": jnp.sqrt(jdam.divergences(memory, moved)[0]),
        "bound": theory.one_step_bound(memory, 0, radius, beta),
        "radius": radius,
        "stretch": distance(moved, other_moved) / distance(query, other),
        "contraction": theory.contraction_bound(memory, 0, radius, beta),
        "basin": theory.basin_radius(memory, beta)[0],
        "fidelity": theory.fidelity(memory, beta)[0],
        "recalled": jnp.sqrt(jdam.divergences(memory, ends.measure)),
        "margin": jnp.min(levels[1:]) - levels[0],
        "margin bound": theory.margins(memory, radius)[0],
        "index": certificate.index,
        "error": certificate.error,
        "size": jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(patterns))),
    }


@pytest.fixture(scope="module")
def found():
    """For every kind, what was found in every case."""
    known, run = {}, jax.jit(jax.vmap(examine))

    def of(kind):
        if kind not in known:
            rng = np.random.default_rng(list(KINDS).index(kind))
            patterns, share, scaled = batch_of_problems(rng, kind)
            keys = jax.random.split(jax.random.key(7), CASES)
            known[kind] = jax.tree.map(np.asarray, run(keys, patterns, share, scaled))
        return known[kind]

    return of


@pytest.mark.full
@every_kind
def test_one_step_bound(found, kind):
    case = found(kind)
    rounding = 1e-12 * case["size"]
    assert (case["after"] <= case["bound"] * (1 + 1e-9) + rounding).all()
    useful = (case["bound"] < case["radius"]) & (case["bound"] > rounding)
    assert useful.sum() > 20
    # The worst query of that radius is not a random one; at the pattern itself little is lost.
    close = case["radius"] < 0.05 * case["separation"]
    ratio = case["bound"][close & useful] / case["after"][close & useful]
    assert np.median(ratio) < 10


@pytest.mark.full
def test_one_step_bound_is_attained(rng):
    """On the way to the nearest pattern little but wᵢ < 1 and the other patterns is lost."""
    memory = jdam.store(gaussians(rng, 20, 5))
    separation = np.asarray(theory.separations(memory))
    gaps = pairwise(memory)

    def on_the_way(index, share, nearest):
        alone = jdam.store(jax.tree.map(lambda leaf: leaf[nearest][None], memory.patterns))
        return jdam.step(alone, memory[index], 1.0, share)

    indices, nearest = np.arange(20), gaps.argmin(1)
    for share in (1e-3, 0.2, 0.4):
        betas = 12 / separation**2 / (1 - 2 * share)
        query = jax.vmap(on_the_way, (0, None, 0))(indices, share, nearest)
        moved = jax.vmap(jdam.step, (None, 0, 0))(memory, query, betas)
        ends = np.sqrt(np.diag(jax.vmap(jdam.divergences, (None, 0))(memory, moved)))
        bounds = jax.vmap(theory.one_step_bound, (None, 0, 0, 0))(
            memory, indices, share * separation, betas
        )
        assert (ends <= bounds).all()
        assert np.median(bounds / ends) < 2


@pytest.mark.full
@every_kind
def test_margins_and_contraction(found, kind):
    case = found(kind)
    slack = 1e-12 * case["size"] ** 2
    assert (case["margin"] >= case["margin bound"] - slack).all()
    assert (case["stretch"] <= case["contraction"] * (1 + 1e-2) + 1e-7).all()
    if kind == "low rank":  # maps to singular covariances may turn at any rate
        assert (case["contraction"] == np.inf).all()
    else:
        assert (case["contraction"] < 1).sum() > (5 if kind == "full" else 20)


@every_kind
def test_certificates_hold(found, kind):
    case = found(kind)
    proved = case["index"] >= 0
    assert 0.2 < proved.mean() < 1
    distance = np.take_along_axis(case["recalled"], case["index"][:, None], 1)[:, 0]
    assert (distance[proved] <= case["error"][proved]).all()
    assert (case["error"][~proved] == np.inf).all()
    # Whatever is within the basin is certified.
    inside = case["radius"] < 0.999 * case["basin"]
    assert inside.sum() > 10
    assert (case["index"][inside] == 0).all()
    assert (case["fidelity"][inside] <= case["error"][inside]).all()
    assert (case["basin"] <= case["separation"] / 2).all()


@pytest.mark.full
def test_separations_and_interference_are_exact(rng):
    for make in (gaussians, diagonals):
        memory = jdam.store(make(rng, 40, 5))
        exact = pairwise(memory)
        np.testing.assert_allclose(theory.separations(memory), np.sqrt(exact.min(1)), rtol=1e-7)
        for beta in (0.1, 1.0, 10.0):
            truth = np.log(np.exp(-beta * exact).sum(1))
            logs = np.asarray(theory.interference(memory, beta))
            assert (logs >= truth - 1e-9).all()
            np.testing.assert_allclose(logs, truth, atol=0.02)
        betas = np.asarray(theory.transition_beta(memory))
        masses = np.exp(-betas[:, None] * exact).sum(1)
        assert (masses <= 0.1 * (1 + 1e-9)).all()
        assert np.median(masses) > 0.09


@pytest.mark.full
def test_priors_count(rng):
    memory = jdam.store(diagonals(rng, 5, 2), log_prior=[0.0, 1.0, -2.0, -np.inf, 0.5])
    odds = np.exp(memory.log_prior[:, None] - memory.log_prior[None]).T
    exact = pairwise(memory)
    with np.errstate(invalid="ignore"):
        truth = np.log((odds * np.exp(-0.7 * exact)).sum(1))
    found = np.asarray(theory.interference(memory, 0.7))
    np.testing.assert_allclose(np.delete(found, 3), np.delete(truth, 3), atol=1e-3)
    assert found[3] > 1e3
    assert np.asarray(theory.basin_radius(memory, 50.0))[3] == 0
    # Against the pattern that is switched off no margin is needed.
    without = theory.separations(memory.remove(3))
    np.testing.assert_allclose(np.delete(theory.separations(memory), 3), without, rtol=1e-12)


@pytest.mark.full
def test_many_patterns_in_groups(rng):
    """Beyond 256 patterns far ones count in groups, which must not undercount."""
    memory = jdam.store(diagonals(rng, 700, 6))
    exact = pairwise(memory)
    betas = np.asarray(theory.transition_beta(memory))
    masses = np.exp(-betas[:, None] * exact).sum(1)
    assert (masses <= 0.1 * (1 + 1e-9)).all()
    assert masses.min() > 0.08
    separation = np.sqrt(exact.min(1))
    beta = 20 / np.median(separation) ** 2
    radii = np.asarray(theory.basin_radius(memory, beta))
    assert (radii > 0).mean() > 0.3
    few = np.flatnonzero(radii > 0)[:20]
    bound = jax.vmap(theory.one_step_bound, (None, 0, 0, None))(memory, few, radii[few], beta)
    assert (bound <= radii[few] * (1 + 1e-6)).all()
    beyond = jax.vmap(theory.one_step_bound, (None, 0, 0, None))(
        memory, few, 1.02 * radii[few], beta
    )
    assert (beyond > 1.02 * radii[few]).all()


@pytest.mark.full
def test_minimum_beta(rng):
    memory = jdam.store(diagonals(rng, 8, 3))
    errors = np.array([1e-1, 1e-4])
    betas = [float(theory.minimum_beta(memory, e)) for e in errors]
    assert betas[0] < betas[1]
    for error, beta in zip(errors, betas, strict=True):
        assert theory.fidelity(memory, beta).max() <= error * (1 + 1e-6)
        assert theory.fidelity(memory, 0.97 * beta).max() > error
        stored = jax.vmap(jdam.recall, (None, 0, None))(memory, memory.patterns, beta)
        ends = np.diag(jax.vmap(jdam.divergences, (None, 0))(memory, stored.measure))
        assert np.sqrt(ends).max() <= error


@pytest.mark.full
def test_temperatures_are_finite_and_fall_with_the_error():
    """Of distinct patterns, however close to rounding the bisection ends."""
    dtype = np.float32
    errors = np.geomspace(0.01, 0.5, 12).astype(dtype)
    minimum = jax.jit(theory.minimum_beta)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        patterns = (3 * rng.normal(size=(6, 3))).astype(dtype)
        prior = np.array([0, -200, 3, 0, 500, -np.inf], dtype)
        for log_prior in (None, prior):
            memory = jdam.store(patterns, log_prior=log_prior)
            on = slice(None) if log_prior is None else prior > -np.inf
            betas = np.array([minimum(memory, e) for e in errors])
            if log_prior is None:
                assert np.isfinite(betas).all()
            assert (np.diff(betas) <= 0).all() | np.isinf(betas).all()
            assert np.isfinite(np.asarray(theory.transition_beta(memory))[on]).all()


@pytest.mark.full
def test_twins_alone_and_beyond(rng):
    twins = jdam.store(np.ones((2, 3)))
    assert np.isinf(theory.minimum_beta(twins, 0.1))
    assert np.isinf(theory.transition_beta(twins)).all()
    assert (theory.basin_radius(twins, 1e3) == 0).all()
    assert int(theory.certify(twins, np.ones(3), 1e3).index) == -1
    alone = jdam.store(diagonals(rng, 1, 2))
    assert np.isinf(theory.separations(alone)).all()
    assert np.isinf(theory.basin_radius(alone, 1.0)).all()
    assert float(theory.fidelity(alone, 1.0)[0]) == 0
    assert int(theory.certify(alone, diagonals(rng, 1, 2)[0], 1.0).index) == 0


@pytest.mark.full
def test_clouds_by_their_means(rng):
    """Lemma 11, sharpened: margins from means, without ε or the number of atoms."""
    memory = jdam.store(clouds(rng, 5, 3, n=4, spread=3.0), jdam.Sinkhorn(0.3))
    means = np.asarray(memory.patterns.mean)
    gaps = np.linalg.norm(means[:, None] - means[None], axis=-1) + np.diag([np.inf] * 5)
    np.testing.assert_allclose(theory.separations(memory), gaps.min(1), rtol=1e-9)
    query = jdam.random.perturb(jax.random.key(1), memory.patterns, 0.2)
    found = jax.vmap(jdam.divergences, (None, 0))(memory, query)
    own = np.diag(found)
    others = np.where(np.eye(5, dtype=bool), np.inf, found).min(1)
    assert (others - own >= theory.margins(memory, np.sqrt(2 * own))).all()
    beta = 2.0
    bounds = jax.vmap(theory.one_step_bound, (None, 0, 0, None))(
        memory, np.arange(5), np.sqrt(2 * own), beta
    )
    moved = jax.vmap(jdam.step, (None, 0, None))(memory, query, beta)
    assert (np.linalg.norm(moved.mean - means, axis=1) <= bounds + 1e-8).all()
    truth = np.log(np.exp(-beta * pairwise(memory)).sum(1))
    np.testing.assert_allclose(theory.interference(memory, beta), truth, atol=2e-3)
    limit = np.asarray(theory.fidelity(memory, beta))
    ends = jax.vmap(jdam.recall, (None, 0, None))(memory, memory.patterns, beta).measure
    assert limit.max() < 0.2
    reached = np.diag(jax.vmap(jdam.divergences, (None, 0))(memory, ends))
    assert (np.sqrt(2 * np.maximum(reached, 0)) <= limit + 1e-7).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: theory.separations(m.patterns), TypeError, "memory must be a jdam.Memory"),
        (
            lambda m: theory.separations(jdam.store(m.patterns.mean, jdam.DotProduct())),
            TypeError,
            "memory must have a geometry whose D is at least a multiple",
        ),
        (lambda m: theory.margins(m, -1.0), ValueError, "radius must be ≥ 0; got -1"),
        (lambda m: theory.margins(m, np.ones(2)), ValueError, r"radius must have shape \(3,\) or"),
        (lambda m: theory.one_step_bound(m, 3, 1.0, 1.0), IndexError, "index 3 is out of range"),
        (lambda m: theory.one_step_bound(m, 0.5, 1.0, 1.0), TypeError, "index must be an int"),
        (lambda m: theory.interference(m, 0.0), ValueError, "beta must be finite and > 0; got 0"),
        (lambda m: theory.minimum_beta(m, -1.0), ValueError, "error must be finite and > 0"),
        (lambda m: theory.certify(m, m[0].mean, 1.0), TypeError, "query must be a jdam.Gaussian"),
    ],
)
def test_refusals(rng, call, error, message):
    with pytest.raises(error, match=message):
        call(jdam.store(gaussians(rng, 3, 2)))


def test_clouds_have_no_contraction(rng):
    memory = jdam.store(clouds(rng, 2, 2, n=3), jdam.Sinkhorn(0.5))
    with pytest.raises(TypeError, match="whose D is a squared metric; got Sinkhorn"):
        theory.contraction_bound(memory, 0, 0.1, 1.0)


@pytest.mark.full
def test_float32(rng):
    memory = jdam.store(gaussians(rng, 30, 5, dtype=np.float32))
    for found in (
        theory.separations(memory),
        theory.interference(memory, 1.0),
        theory.fidelity(memory, 30.0),
        theory.minimum_beta(memory, 1e-3),
    ):
        assert found.dtype == jnp.float32
        assert np.isfinite(found).any()
    exact = pairwise(memory)
    np.testing.assert_allclose(theory.separations(memory), np.sqrt(exact.min(1)), rtol=1e-5)
