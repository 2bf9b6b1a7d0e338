"""Recall in any pose: poses that are known, invariance, derivatives, files."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from jdam.geometry._poses import rotations
from tests.cases import only_full
from tests.helpers import check_derivatives, orthogonal

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ott-jax imports packages that announce their end
    from ott.geometry import costs

GEOMETRIES = {
    "one-sided": jdam.Chamfer(0.02),
    "one-sided, rho": jdam.Chamfer(0.02, rho=0.3),
    "balanced": jdam.Sinkhorn(0.02),
    "unbalanced": jdam.Sinkhorn(0.02, rho=0.5),
}
BETA = 40.0


def rotation(rng, dim):
    turn = orthogonal(rng, dim)
    turn[:, 0] *= np.sign(np.linalg.det(turn))
    return turn


def problem(rng, dim=2, num=3, atoms=6):
    """Patterns, a rotation, a translation, and the second pattern so posed."""
    patterns = jdam.PointCloud(2 * rng.normal(size=(num, atoms, dim)))
    turn, shift = rotation(rng, dim), 3 * rng.normal(size=dim)
    return patterns, turn, shift, moved(patterns[1], turn, shift)


def moved(cloud, turn, shift):
    return jdam.PointCloud(np.asarray(cloud.points) @ turn.T + shift[None], cloud.weights)


def noisy(rng, cloud, size=0.1):
    return jdam.PointCloud(cloud.points + size * rng.normal(size=cloud.points.shape), cloud.weights)


match = jax.jit(jdam.match)


@pytest.mark.parametrize(
    ("name", "dim"),
    [("one-sided", 2), *only_full(("one-sided, rho", 3), ("balanced", 3), ("unbalanced", 2))],
)
def test_a_known_pose_is_found(rng, name, dim):
    patterns, turn, shift, cue = problem(rng, dim)
    memory = jdam.store(patterns, jdam.Aligned(GEOMETRIES[name]))
    found = match(memory, cue, 1)
    np.testing.assert_allclose(found.divergence, 0, atol=1e-6)
    np.testing.assert_allclose(found.pose.rotation, turn, atol=1e-3)
    np.testing.assert_allclose(found.pose.translation, shift, atol=1e-3)
    np.testing.assert_allclose(found.targets, cue.points, atol=0.05)
    assert found.pose.scale == 1


def test_a_recall_keeps_the_pose_of_the_cue(rng):
    """It descends, ends on the pattern in its pose, and moves with the cue."""
    patterns, turn, shift, _ = problem(rng)
    memory = jdam.store(patterns, jdam.Aligned(GEOMETRIES["one-sided, rho"]))
    start = noisy(rng, patterns[1], 0.05)

    @jax.jit
    def run(memory, cue):
        result = jdam.recall(memory, cue, BETA, save_trace=True, max_steps=12)
        return result, jdam.divergences(memory, cue)

    (result, before), (other, after) = run(memory, start), run(memory, moved(start, turn, shift))
    np.testing.assert_allclose(after, before, atol=1e-6)
    for found in (result, other):
        assert found.nearest == 1
        assert np.diff(found.trace.energy).max() <= 1e-12
        np.testing.assert_allclose(found.pose(patterns[1]).points, found.measure.points, atol=0.1)
    again = moved(result.measure, turn, shift)
    np.testing.assert_allclose(other.measure.points, again.points, atol=1e-3)
    back = other.pose.inverse(other.pose(patterns[1]))
    np.testing.assert_allclose(back.points, patterns.points[1], atol=1e-12)


@pytest.mark.full
def test_a_recall_of_transport(rng):
    patterns, turn, shift, _ = problem(rng)
    memory = jdam.store(patterns, jdam.Aligned(GEOMETRIES["balanced"]))
    cue = moved(noisy(rng, patterns[1], 0.2), turn, shift)
    result = jdam.recall(memory, cue, BETA, save_trace=True, max_steps=12)
    assert result.nearest == 1
    assert np.diff(result.trace.energy).max() <= 1e-12
    np.testing.assert_allclose(result.pose(patterns[1]).points, result.measure.points, atol=0.1)


def test_a_partial_cue_is_completed(rng):
    patterns, _, _, whole = problem(rng, dim=3)
    memory = jdam.store(patterns, jdam.Aligned(GEOMETRIES["one-sided, rho"]))
    part = jdam.PointCloud(whole.points[:5]).pad(6)
    completed = match(memory, part, 1).pose(memory[1])
    np.testing.assert_allclose(completed.points, whole.points, atol=0.05)


@pytest.mark.full
def test_derivatives_of_the_energy(rng):
    patterns, _, _, cue = problem(rng)
    epsilon = jnp.float64(0.1)

    def of(epsilon, points, cue):
        inner = jdam.Sinkhorn(epsilon, tol=1e-12)
        memory = jdam.store(jdam.PointCloud(points), jdam.Aligned(inner))
        return jdam.energy(memory, jdam.PointCloud(cue), 3.0)

    check_derivatives(of, (epsilon, patterns.points, noisy(rng, cue).points), rtol=1e-4, atol=1e-6)


@pytest.mark.full
def test_a_batch_is_its_elements(rng):
    patterns, _, _, cue = problem(rng)
    memory = jdam.store(patterns, jdam.Aligned(GEOMETRIES["one-sided, rho"]))
    cues = jdam.stack([cue, noisy(rng, cue), patterns[0]])
    together = jax.jit(jax.vmap(jdam.match, (None, 0, None)))(memory, cues, 1)
    for i in range(3):
        alone = match(memory, cues[i], 1)
        np.testing.assert_allclose(together.divergence[i], alone.divergence, atol=1e-9)
    posed = together.pose(patterns[jnp.array([1, 1, 1])])
    np.testing.assert_allclose(posed.points[0], cue.points, atol=1e-3)


def test_reflections(rng):
    """A mirror image is found if that is allowed, and not else."""
    patterns, turn, shift, _ = problem(rng)
    mirror = turn * np.array([[1.0, -1.0]])
    cue = moved(patterns[1], mirror, shift)
    inner = GEOMETRIES["one-sided"]
    free = match(jdam.store(patterns, jdam.Aligned(inner, reflections=True)), cue, 1)
    proper = match(jdam.store(patterns, jdam.Aligned(inner)), cue, 1)
    np.testing.assert_allclose(free.pose.rotation, mirror, atol=1e-3)
    np.testing.assert_allclose(np.linalg.det(proper.pose.rotation), 1)
    assert proper.divergence > free.divergence + 0.05


@pytest.mark.full
def test_parts_of_the_group(rng):
    patterns, turn, shift, _ = problem(rng)
    inner, still = GEOMETRIES["one-sided"], np.zeros(2)
    only_shifted = jdam.store(patterns, jdam.Aligned(inner, rotations=False))
    found = match(only_shifted, moved(patterns[1], np.eye(2), shift), 1)
    np.testing.assert_allclose(found.pose.translation, shift, atol=1e-3)
    np.testing.assert_array_equal(found.pose.rotation, np.eye(2))
    only_turned = jdam.store(patterns, jdam.Aligned(inner, translations=False, num_starts=8))
    found = match(only_turned, moved(patterns[1], turn, still), 1)
    np.testing.assert_allclose(found.pose.rotation, turn, atol=1e-3)
    np.testing.assert_array_equal(found.pose.translation, still)


@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_the_net_of_rotations(dim):
    net = rotations(64, dim)
    np.testing.assert_allclose(
        net @ np.swapaxes(net, 1, 2), np.broadcast_to(np.eye(dim), net.shape), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(net), 1)
    np.testing.assert_allclose(net[0], np.eye(dim), atol=1e-12)
    if dim == 3:  # some start lies within 45° of every rotation
        traces = np.einsum("aij,bij->ab", net, rotations(500, 3))
        angles = np.arccos(np.clip((traces.max(0) - 1) / 2, -1, 1))
        assert np.degrees(angles.max()) < 55


def test_files(rng, tmp_path):
    patterns, _, _, cue = problem(rng)
    memory = jdam.store(patterns, jdam.Aligned(GEOMETRIES["one-sided, rho"]))
    jdam.save(tmp_path / "memory", memory)
    loaded = jdam.load(tmp_path / "memory")
    assert repr(loaded.geometry) == repr(memory.geometry)
    found, expected = match(loaded, cue, 1), match(memory, cue, 1)
    np.testing.assert_array_equal(found.divergence, expected.divergence)


def test_messages():
    inner = jdam.Chamfer(0.1)
    assert repr(jdam.Aligned(inner, num_starts=8)) == f"Aligned({inner}, num_starts=8)"
    for geometry in (jdam.Bures(), jdam.DotProduct(), "Chamfer"):
        with pytest.raises(TypeError, match=r"geometry must be a jdam\.Chamfer"):
            jdam.Aligned(geometry)
    for settings, message in [
        ({"rotations": False, "translations": False}, "rotations, translations or scale must be"),
        ({"rotations": False, "reflections": True}, "reflections must be False without"),
        ({"num_starts": 0}, "num_starts must be ≥ 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            jdam.Aligned(inner, **settings)
    assert repr(jdam.Aligned(inner, scale=True)) == f"Aligned({inner}, scale=True)"
    with pytest.raises(ValueError, match="geometry must have the cost"):
        jdam.Aligned(jdam.Sinkhorn(0.1, cost=costs.PNormP(1.5)))
    with pytest.raises(TypeError, match="rotations must be a bool"):
        jdam.Aligned(inner, rotations=1)
    with pytest.raises(TypeError, match=r"patterns must be a jdam\.PointCloud"):
        jdam.store(np.zeros((3, 2)), jdam.Aligned(inner))
    pose = jdam.Pose(jnp.eye(2), jnp.ones(2), jnp.ones(()))
    np.testing.assert_array_equal(pose(np.zeros((4, 3, 2))), np.ones((4, 3, 2)))
    with pytest.raises(TypeError, match="points must be an array"):
        pose("points")


@pytest.mark.full
def test_features_go_with_the_atoms(rng):
    """A labelled copy is found in its pose, and keeps its labels."""
    points, labels = rng.normal(size=(4, 6, 2)), rng.integers(0, 3, size=(4, 6))
    patterns = jdam.PointCloud(points, None, np.eye(3)[labels])
    geometry = jdam.Aligned(jdam.Chamfer(0.02, feature_scale=0.5))
    memory, turn = jdam.store(patterns, geometry), np.array([[0.6, -0.8], [0.8, 0.6]])
    cue = jdam.PointCloud(points[2] @ turn.T + 3, None, np.eye(3)[labels[2]])
    found = jdam.recall(memory, cue, 50.0)
    assert found.nearest == 2
    np.testing.assert_allclose(found.pose.rotation, turn, atol=1e-3)
    np.testing.assert_array_equal(found.pose(memory[2]).features, cue.features)
    np.testing.assert_allclose(found.pose(memory[2]).points, cue.points, atol=2e-3)


@pytest.mark.full
def test_a_scale_is_found(rng):
    """Of copies that are turned and larger or smaller."""
    patterns, turn, shift, _ = problem(rng, dim=3)
    geometry = jdam.Aligned(GEOMETRIES["one-sided, rho"], scale=True)
    memory = jdam.store(patterns, geometry)
    for scale in (0.7, 1.6):
        pose = jdam.Pose(jnp.asarray(turn), jnp.asarray(shift), jnp.asarray(scale))
        found = match(memory, pose(patterns[1]), 1)
        np.testing.assert_allclose(found.pose.scale, scale, rtol=1e-3)
        np.testing.assert_allclose(found.pose.rotation, turn, atol=1e-3)
        np.testing.assert_allclose(found.divergence, 0, atol=1e-5)


def blurred(rng):
    """Clouds whose atoms ε blurs, and a cue beside one of them."""
    patterns = jdam.PointCloud(rng.normal(size=(2, 5, 2)))
    return patterns, noisy(rng, moved(patterns[1], rotation(rng, 2), np.ones(2)), 0.2)


@pytest.mark.full
@pytest.mark.parametrize("balanced", [True, False])
def test_poses_are_stationary_and_have_derivatives(rng, balanced):
    """The gradient at a held pose is that of D; the pose follows the cue."""
    patterns, cue = blurred(rng)
    inner = jdam.Sinkhorn(0.1, tol=1e-12) if balanced else jdam.Chamfer(0.05, rho=0.5)
    memory = jdam.store(patterns, jdam.Aligned(inner, scale=not balanced))

    def of(points):
        found = jdam.match(memory, jdam.PointCloud(points), 1)
        pose = found.pose
        return found.divergence, pose.rotation, pose.translation, pose.scale, found.plan

    check_derivatives(of, (cue.points,), rtol=1e-4, atol=1e-6)


@pytest.mark.full
def test_second_derivatives(rng):
    patterns, cue = blurred(rng)
    memory = jdam.store(patterns, jdam.Aligned(jdam.Chamfer(0.1, rho=0.5)))
    slope = jax.grad(lambda points: jdam.energy(memory, jdam.PointCloud(points), 3.0))
    check_derivatives(slope, (cue.points,), rtol=1e-3, atol=1e-6)


@pytest.mark.full
def test_derivatives_of_steps_and_recalls(rng):
    patterns, cue = blurred(rng)

    def stepped(points, others):
        memory = jdam.store(
            jdam.PointCloud(others), jdam.Aligned(jdam.Chamfer(0.1, rho=0.5), num_starts=4)
        )
        return jdam.step(memory, jdam.PointCloud(points), 3.0).points

    check_derivatives(stepped, (cue.points, patterns.points), rtol=1e-3, atol=1e-6)


def mixtures(rng, dim=2, num=3, components=3):
    factors = 0.3 * rng.normal(size=(num, components, dim, dim))
    weights = np.full((num, components), 1 / components)
    return jdam.GaussianMixture(weights, 2 * rng.normal(size=(num, components, dim)), factors)


@pytest.mark.full
def test_mixtures(rng):
    patterns = mixtures(rng, dim=3)
    turn, shift, size = rotation(rng, 3), rng.normal(size=3), 1.5
    pose = jdam.Pose(*map(jnp.asarray, (turn, shift, size)))
    memory = jdam.store(patterns, jdam.Aligned(jdam.MixtureWasserstein(), scale=True))
    found = match(memory, pose(patterns[1]))
    assert found.index == 1
    np.testing.assert_allclose(found.divergence, 0, atol=1e-8)
    np.testing.assert_allclose(found.pose.rotation, turn, atol=1e-4)
    np.testing.assert_allclose(found.pose.scale, size, rtol=1e-4)


@pytest.mark.full
def test_one_gaussian_is_turned_by_its_covariance(rng):
    """There is nothing but factors to tell the pose, up to signs of the axes."""
    patterns = jdam.GaussianMixture([[1.0]], [[[1.0, 0.0]]], [[[[2.0, 0.0], [0.0, 0.3]]]])
    memory = jdam.store(patterns, jdam.Aligned(jdam.MixtureWasserstein()))
    pose = jdam.Pose(jnp.asarray(rotation(rng, 2)), jnp.ones(2), jnp.ones(()))
    found = match(memory, pose(patterns[0]), 0)
    np.testing.assert_allclose(found.divergence, 0, atol=1e-8)


@pytest.mark.full
def test_bounds_of_mixtures_are_proved(rng):
    """They are below D, and `Certified` finds what comparing all does."""
    patterns = mixtures(rng, num=6)
    memory = jdam.store(patterns, jdam.Aligned(jdam.MixtureWasserstein()))
    cue = jdam.Pose(jnp.asarray(rotation(rng, 2)), jnp.ones(2), jnp.ones(()))(patterns[2])
    order, distances = jdam.nearest(memory, cue, 6)
    some, _ = jdam.nearest(memory, cue, 2, search=jdam.Certified(num_candidates=2))
    np.testing.assert_array_equal(order[:2], some)

    @jax.jit
    def bounded(memory, cue):
        (bound,) = memory.geometry.bounds(None)
        return bound(memory.geometry.view(cue), jdam.Patterns(memory.patterns, memory.prepared))

    below = bounded(memory, cue)
    assert (below[order] <= distances).all()
    assert below.max() > 0.1


@pytest.mark.full
def test_four_dimensions(rng):
    patterns, turn, shift, cue = problem(rng, dim=4, atoms=10)
    memory = jdam.store(patterns, jdam.Aligned(GEOMETRIES["one-sided, rho"]))
    found = match(memory, cue, 1)
    np.testing.assert_allclose(found.pose.rotation, turn, atol=1e-3)
    np.testing.assert_allclose(found.pose.translation, shift, atol=1e-3)
    part = jdam.PointCloud(cue.points[:8]).pad(10)
    np.testing.assert_allclose(match(memory, part, 1).pose.rotation, turn, atol=0.02)


def procrustes(x, y, *, reflections=False, scale=False):
    """The least Σ|x − g y|² over motions of y, from the singular values of XᵀY."""
    x, y = x - x.mean(0), y - y.mean(0)
    left, values, right = np.linalg.svd(x.T @ y)
    values[-1] *= 1 if reflections else np.linalg.det(left @ right)
    trace = values.sum()
    if scale:
        return (x**2).sum() - trace**2 / (y**2).sum()
    return (x**2).sum() + (y**2).sum() - 2 * trace


@pytest.mark.parametrize("options", [{}, *only_full({"scale": True}, {"reflections": True})])
def test_landmarks_solve_the_procrustes_problem(rng, options):
    patterns, turn = rng.normal(size=(3, 5, 3)), rotation(rng, 3)
    memory = jdam.store(patterns, jdam.Aligned(jdam.Euclidean(), **options))
    cue = patterns[1] @ turn.T + 0.1 * rng.normal(size=(5, 3)) + 7
    expected = [procrustes(cue, pattern, **options) for pattern in patterns]
    np.testing.assert_allclose(jdam.divergences(memory, cue), expected, rtol=1e-10)
    found = match(memory, cue, 1)
    np.testing.assert_allclose(found.divergence, expected[1], rtol=1e-10)
    np.testing.assert_allclose(found.targets, found.pose(patterns[1]))
    np.testing.assert_allclose(((cue - found.targets) ** 2).sum(), expected[1], rtol=1e-10)


def test_recall_of_landmarks(rng):
    """The energy falls to the pattern in the pose of the cue, and has exact derivatives."""
    patterns, turn = rng.normal(size=(3, 5, 2)), rotation(rng, 2)
    memory = jdam.store(patterns, jdam.Aligned(jdam.Euclidean()), capacity=4)
    cue = patterns[1] @ turn.T + 0.1 * rng.normal(size=(5, 2)) + 7
    result = jdam.recall(memory, cue, 3.0, save_trace=True)
    assert result.nearest == 1
    assert result.status == jdam.Status.CONVERGED
    assert (np.diff(result.trace.energy) <= 1e-12).all()
    np.testing.assert_allclose(result.measure, result.pose(patterns[1]), atol=1e-4)
    check_derivatives(lambda cue: jdam.energy(memory, cue, 0.3), (cue,))
    with pytest.raises(ValueError, match=r"n = 5 landmarks as the patterns have; got n = 4"):
        jdam.energy(memory, cue[:4], 1.0)
    with pytest.raises(ValueError, match=r"n = 5 landmarks as the patterns have; got n = 4"):
        memory.append(patterns[:1, :4])
    with pytest.raises(ValueError, match=r"query must have shape \(n, d\)"):
        jdam.energy(memory, patterns, 1.0)


def test_reflections_of_a_line_have_no_derivative(rng):
    """The group is discrete, and the pose is a constant."""
    patterns = jdam.PointCloud(rng.normal(size=(2, 4, 1)))
    memory = jdam.store(patterns, jdam.Aligned(jdam.Chamfer(0.2), translations=False))
    plain = jdam.store(patterns, jdam.Chamfer(0.2))
    found, expected = (
        jax.grad(jdam.energy, argnums=1)(m, patterns[0], 1.0) for m in (memory, plain)
    )
    np.testing.assert_allclose(found.points, expected.points, atol=1e-12)
