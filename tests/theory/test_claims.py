"""Claims of the two papers that no other test checks, on random cases and on cases near equality.

Lemmas are those of arXiv:2603.20656; D is the diameter of a ball that holds all atoms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom

import jdam
from jdam import theory
from tests.helpers import entropic_transport, orthogonal, sinkhorn_divergence

pytestmark = pytest.mark.full

KAPPA, NUM, ATOMS, CASES = 0.5, 3, 4, 96
CORNERS = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
WEIGHTS = np.array([0.2, 0.3, 0.25, 0.25])


def memory_of(points, weights=WEIGHTS, epsilon=0.1):
    weights = np.broadcast_to(weights, points.shape[:-1])
    geometry = jdam.Sinkhorn(epsilon, hellinger_scale=KAPPA, tol=1e-12)
    return jdam.store(jdam.PointCloud(points, weights), geometry)


@pytest.fixture(scope="module")
def look():
    """E, all S_ε, velocities v = −∇F and variations F, centred, of a batch of queries: of one
    shape throughout, so that one program serves all tests."""

    def one(memory, query, beta):
        energy, slope = jax.value_and_grad(jdam.energy, argnums=1)(memory, query, beta)
        velocity = -slope.points / query.weights[:, None]
        variation = slope.weights - jnp.vdot(query.weights, slope.weights)
        return energy, jdam.divergences(memory, query), velocity, variation

    run = jax.jit(jax.vmap(one, (None, 0, None)))

    def of(memory, points, weights, beta):
        assert points.shape == (CASES, ATOMS, 2)
        weights = np.broadcast_to(weights, points.shape[:-1])
        found = run(memory, jdam.PointCloud(points, weights), beta)
        return tuple(np.asarray(leaf) for leaf in found)

    return of


def in_disk(rng, *shape):
    """Points of the unit disk, half of them on its edge."""
    way = rng.normal(size=(*shape, 2))
    radius = np.where(rng.random(shape) < 0.5, 1, rng.random(shape))
    return way / np.linalg.norm(way, axis=-1, keepdims=True) * radius[..., None]


# ------------------------------------------------------------------------ paper A


def test_the_classical_memory_is_a_special_case(rng):
    """Gaussians of common axes and of one norm |μ|² + tr Σ: Φ is z⁺ = Σ softmax(2β⟨z, zᵢ⟩)zᵢ
    with z = (μ, √λ), the update of Ramsauer et al.; of several norms it is not."""
    axes = orthogonal(rng, 3)
    stored = np.concatenate([rng.normal(size=(7, 3)), rng.uniform(0.3, 1.2, (7, 3))], 1)
    query = np.concatenate([rng.normal(size=3), rng.uniform(0.3, 1.2, 3)])

    def turned(z):
        return jdam.Gaussian(z[..., :3] @ axes.T, axes * z[..., None, 3:])

    def errors(z):
        logits = 2 * 0.8 * z @ query
        expected = turned(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum() @ z)
        moved = jdam.step(jdam.store(turned(z)), turned(query), 0.8)
        return (
            abs(moved.mean - expected.mean).max()
            + abs(moved.covariance - expected.covariance).max()
        )

    assert errors(stored / np.linalg.norm(stored, axis=1, keepdims=True)) < 1e-13
    assert errors(stored) > 0.1


# ------------------------------------------------------------------ paper B: geometry


def test_lemma_1_basins_are_compact(rng):
    """With C = S_ε(q, X) + ε log n atoms are within ρ = √(2C/w₀) of those of X, one each, and
    weights within η = 2C/(sep − ρ)², if ρ < ½ sep and η ≤ min b − w₀."""
    epsilon, least, apart = 1e-3, 0.19, 2.0
    moved, tilted = [], []
    for case in range(30):
        moves, tilts = np.zeros((ATOMS, 2)), np.zeros(ATOMS)
        size = 10 ** rng.uniform(-1.5, -0.5)
        if case % 3 == 0:  # the lightest atom moves alone
            moves[0, 0] = size
        else:  # it takes weight from its neighbour, and all atoms move or none
            tilts[:2] = rng.uniform(1e-3, 6e-3) * np.array([1, -1])
            moves = (case % 3 - 1) * 0.3 * size * rng.normal(size=(ATOMS, 2))
        order = rng.permutation(ATOMS)
        points, weights = (CORNERS + moves)[order], (WEIGHTS + tilts)[order]
        level = sinkhorn_divergence(points, weights, CORNERS, WEIGHTS, epsilon)[0]
        cost = float(level) + epsilon * np.log(ATOMS)
        near = np.sqrt(2 * cost / least)
        tilt = 2 * cost / (apart - near) ** 2
        if near < apart / 2 and tilt <= WEIGHTS.min() - least:
            gaps = np.linalg.norm(points[:, None] - CORNERS, axis=-1)
            partner = gaps.argmin(1)
            assert sorted(partner) == list(range(ATOMS))
            moved.append(gaps.min(1).max() / near)
            tilted.append(abs(weights - WEIGHTS[partner]).max() / tilt)
    assert len(moved) > 15
    assert 0.8 < max(moved) <= 1
    assert 0.5 < max(tilted) <= 1


def test_lemma_2_steps_stay_among_clouds(look, rng):
    """Steps (28), (29) with τκD² ≤ ½ log((min b − η)/w₀) and τD ≤ ½(sep − 2ρ − δ₀) leave weights
    above w₀ and atoms farther than δ₀ apart."""
    least, close, near, tilt, apart = 0.1, 0.1, 0.2, 0.02, 2.0
    # Another pattern pulls: the bounds are on any gradient, whichever patterns it comes from.
    others = np.stack([[0.0, 1.5] + 0.1 * CORNERS] * NUM)
    memory = memory_of(others, rng.dirichlet(np.full(ATOMS, 9.0), NUM))
    points = CORNERS + near * in_disk(rng, CASES, ATOMS)
    weights = WEIGHTS + tilt * np.eye(ATOMS)[rng.integers(4, size=CASES)]
    weights = weights - tilt / ATOMS
    diameter = 2 * max(np.linalg.norm(x, axis=-1).max() for x in (points, others))
    by_weights = np.log((WEIGHTS.min() - tilt) / least) / (2 * KAPPA * diameter**2)
    step = min(by_weights, (apart - 2 * near - close) / (2 * diameter))
    _, _, velocity, variation = look(memory, points, weights, 2.0)
    moved = points + step * velocity
    weighed = weights * np.exp(-step * KAPPA * variation)
    weighed /= weighed.sum(1, keepdims=True)
    gaps = np.linalg.norm(moved[:, :, None] - moved[:, None], axis=-1) + 9 * np.eye(ATOMS)
    assert weighed.min() > least
    assert gaps.min() > close
    speed = np.linalg.norm(velocity, axis=-1)
    assert 0.5 * diameter < speed.max() <= diameter
    change = abs(np.log(weighed / weights)).max() / (2 * step * KAPPA * diameter**2)
    assert 0.05 < change <= 1


def lengths(first, second, weights, others, steps=200):
    """Of straight ways from (x, p) to (y, q), in the SHK metric."""
    t = (np.arange(steps) + 0.5)[:, None] / steps
    p = (1 - t) * weights + t * others
    kinetic = (p * ((second - first) ** 2).sum(-1)).sum(1)
    return np.sqrt(kinetic + ((others - weights) ** 2 / p).sum(1) / KAPPA).mean()


def test_lemma_2_compares_metrics(rng):
    """d_SHK ≤ max(√max p, 1/√(κ min p)) · Euclid, p over all weights on the way."""
    ratios = []
    for case in range(50):
        x, y = rng.normal(size=(2, ATOMS, 2))
        p, q = rng.dirichlet(np.full(ATOMS, 5.0), 2)
        if case % 2:
            y = x
            q = p + 1e-3 * np.eye(ATOMS)[p.argmin()] - 1e-3 * np.eye(ATOMS)[np.argsort(p)[1]]
        euclid = np.sqrt(((x - y) ** 2).sum() + ((p - q) ** 2).sum())
        both = np.stack([p, q])
        factor = max(np.sqrt(both.max()), 1 / np.sqrt(KAPPA * both.min()))
        ratios.append(lengths(x, y, p, q) / (factor * euclid))
    assert max(ratios) <= 1 + 1e-9
    assert max(ratios) > 0.9


def test_lemma_7_retraction(rng):
    """The way t ↦ (x + tv, p e^{th}/Z) has length ≤ C|ξ|, C = (e^{M/2} − 1)/(M/2), M = max|h|,
    which is below both forms that the paper's constant may have."""
    nodes, shares = np.polynomial.legendre.leggauss(30)
    t = (nodes[:, None] + 1) / 2
    ratios = []
    for case in range(200):
        p, h = rng.dirichlet(np.ones(ATOMS)), rng.normal(size=ATOMS)
        v = rng.normal(size=ATOMS) * 10 ** rng.uniform(-1, 1)
        if case == 0:  # all speed at a light atom that grows
            p, h, v = np.array([1e-7, 0.5, 0.3, 0.2 - 1e-7]), np.eye(4)[0], np.eye(4)[0]
        h = h - p @ h
        h *= 10 ** rng.uniform(-2, 0.7) / abs(h).max()
        most = abs(h).max()
        way = p * np.exp(t * h)
        way /= way.sum(1, keepdims=True)
        variance = way @ h**2 - (way @ h) ** 2
        length = shares @ np.sqrt(way @ v**2 + KAPPA * variance) / 2
        start = np.sqrt(p @ v**2 + KAPPA * p @ h**2)
        constant = np.expm1(most / 2) / (most / 2)
        assert constant <= min(np.expm1(most) / most, np.exp(most))
        ratios.append(length / (constant * start))
    assert max(ratios) <= 1 + 1e-9
    assert ratios[0] > 0.999


def test_lemma_8_gradients(look, rng):
    """|v| ≤ D, |F − F̄| ≤ D², |grad E| ≤ D√(1 + κD²/4), which is below the paper's D√(1 + κD²)."""
    diameter, ends = 2.0, np.array([[-1.0, 0.0], [1.0, 0.0]])
    points, weights = in_disk(rng, CASES, ATOMS), rng.dirichlet(np.ones(ATOMS), CASES)
    points[: CASES // 4] = ends[1]
    points[: CASES // 8, 0] = ends[0]  # nearly all mass where the patterns are
    weights[: CASES // 8] = [0.97, 0.01, 0.01, 0.01]
    largest = np.zeros(3)
    for patterns in (in_disk(rng, NUM, ATOMS), np.broadcast_to(ends[0], (NUM, ATOMS, 2))):
        _, _, velocity, variation = look(memory_of(patterns), points, weights, 3.0)
        speed = np.linalg.norm(velocity, axis=-1)
        size = (weights * (speed**2 + KAPPA * variation**2)).sum(1)
        bound = diameter * np.sqrt(1 + KAPPA * diameter**2 / 4)
        ratios = speed.max() / diameter, abs(variation).max() / diameter**2, size.max() ** 0.5
        largest = np.maximum(largest, np.divide(ratios, (1, 1, bound)))
    assert (largest <= 1 + 1e-9).all()
    assert (largest > [0.999, 0.4, 0.8]).all()


def test_energies_are_lipschitz(look, rng):
    """By Lemmas 8 and 9, |E(q) − E(q′)| ≤ max |Sᵢ(q) − Sᵢ(q′)|, and E and all Sᵢ are G-Lipschitz in
    d_SHK: where atoms move alone, or weights change alone, both lengths are known exactly."""
    diameter = 2.0
    bound = diameter * np.sqrt(1 + KAPPA * diameter**2 / 4)
    points, weights = in_disk(rng, CASES, ATOMS), rng.dirichlet(np.ones(ATOMS), CASES)
    moved = points + 0.1 * (in_disk(rng, CASES, ATOMS) - points)
    weighed = 0.8 * weights + 0.2 * rng.dirichlet(np.ones(ATOMS), CASES)
    far = np.broadcast_to([-1.0, 0.0], (NUM, ATOMS, 2))
    points[0], moved[0] = [1.0, 0.0], [0.99, 0.0]
    tightest = np.zeros(2)
    for patterns in (in_disk(rng, NUM, ATOMS), far):
        memory = memory_of(patterns)
        here, *ends = (
            np.concatenate([energy[:, None], levels], 1)
            for energy, levels, _, _ in (
                look(memory, points, weights, 3.0),
                look(memory, moved, weights, 3.0),
                look(memory, points, weighed, 3.0),
            )
        )
        way = np.sqrt((weights * ((moved - points) ** 2).sum(-1)).sum(1))
        turn = np.arccos(np.clip(np.sqrt(weights * weighed).sum(1), 0, 1)) * 2 / np.sqrt(KAPPA)
        for kind, (there, length, most) in enumerate(
            zip(ends, (way, turn), (diameter, bound), strict=True)
        ):
            change = abs(there - here)
            assert (change[:, 0] <= change[:, 1:].max(1) + 1e-12).all()
            ratio = change / (most * length)[:, None]
            assert (ratio <= 1 + 1e-9).all()
            tightest[kind] = max(tightest[kind], ratio.max())
    assert tightest[0] > 0.99
    assert tightest[1] > 0.1


# ---------------------------------------------------------- paper B: energies and bounds


def test_lemma_5_one_pattern_has_nearly_all_weight(look, rng):
    """Sᵢ − β⁻¹log(1 + (N−1)e^{−βΔ}) ≤ E ≤ Sᵢ and 1 − wᵢ ≤ (N−1)e^{−βΔ}/(1 + (N−1)e^{−βΔ}), with
    equality at a corner of an equilateral triangle of patterns."""
    angles = 2 * np.pi * np.arange(NUM) / NUM
    shifts = np.stack([np.cos(angles), np.sin(angles)], 1)
    memory = memory_of(0.3 * CORNERS + shifts[:, None])
    points = 0.3 * CORNERS + shifts[0] + 0.4 * rng.normal(size=(CASES, ATOMS, 2))
    points[0] = 0.3 * CORNERS + shifts[0]
    for beta in (0.5, 5.0):
        energy, levels, _, _ = look(memory, points, WEIGHTS, beta)
        margin = levels[:, 1:].min(1) - levels[:, 0]
        inside = margin > 0
        assert inside.sum() > CASES / 2
        others = (NUM - 1) * np.exp(-beta * margin)
        low, high = levels[:, 0] - np.log1p(others) / beta, levels[:, 0]
        assert (low <= energy + 1e-12)[inside].all()
        assert (energy <= high + 1e-12)[inside].all()
        weight = np.exp(-beta * (levels[:, 0] - energy))
        assert (1 - weight <= others / (1 + others) + 1e-12)[inside].all()
        np.testing.assert_allclose(energy[0], low[0], rtol=1e-9)


def test_lemmas_12_to_14_means_bound_divergences(rng):
    """OT_ε ≥ ½|Δm|², OT_ε(μ, μ) ≤ εH(p) ≤ ε log n, and S_ε ≥ ½|Δm|² without the paper's
    (ε/2)(log n + log m)."""
    ratios, entropies = [], []
    for case in range(16):
        epsilon = 10 ** rng.uniform(-2, 0)
        x, a = rng.normal(size=(4, 2)), rng.dirichlet(np.full(4, 3.0))
        y, b = rng.normal(size=(5, 2)), rng.dirichlet(np.full(5, 3.0))
        if case == 0:
            y, b = x + 3, a
        if case == 1:  # atoms so far apart that the plan is the diagonal
            x, a, epsilon = 2 * CORNERS, np.full(4, 0.25), 0.05
        cross, mine, theirs = (
            float(entropic_transport(*args, epsilon)[0])
            for args in ((x, a, y, b), (x, a, x, a), (y, b, y, b))
        )
        shift = ((a @ x - b @ y) ** 2).sum() / 2
        divergence = cross - mine / 2 - theirs / 2
        assert cross >= shift
        assert divergence >= shift - 1e-12
        assert mine <= -epsilon * a @ np.log(a) + 1e-12
        ratios.append(shift / divergence)
        entropies.append(mine / (epsilon * np.log(4)))
    np.testing.assert_allclose(ratios[0], 1, rtol=1e-9)  # translates
    np.testing.assert_allclose(entropies[1], 1, rtol=1e-9)
    assert max(entropies) <= 1 + 1e-9


def test_lemmas_15_and_16_random_means_are_far_apart():
    """|m − m′|² = 4a²K/d with K of Bin(d, ½): P(|m − m′|² ≤ 2a²(1−η)) ≤ e^{−η²d/2}, and the union
    over all pairs of `cloud_capacity` means fails with probability ≤ δ. Exact tails."""
    tightest = 0.0
    for dim in (4, 16, 64, 256, 1024):
        for overlap in (0.05, 0.1, 0.3, 0.5, 0.8):
            tail = binom.cdf(np.floor(dim * (1 - overlap) / 2 + 1e-9), dim, 0.5)
            bound = np.exp(-(overlap**2) * dim / 2)
            assert tail <= bound
            tightest = max(tightest, tail / bound)
            for failure in (0.01, 0.5):
                num = np.floor(theory.cloud_capacity(dim, overlap=overlap, failure=failure))
                assert num * (num - 1) / 2 * tail <= failure
    assert tightest > 0.5


def test_what_steps_are_made_of_is_deterministic(look, rng):
    """The same memory, built anew, and the same queries give the same bits."""
    patterns, points = rng.normal(size=(NUM, ATOMS, 2)), rng.normal(size=(CASES, ATOMS, 2))
    first, again = (look(memory_of(patterns), points, WEIGHTS, 4.0) for _ in range(2))
    for leaf, other in zip(first, again, strict=True):
        assert leaf.tobytes() == other.tobytes()
