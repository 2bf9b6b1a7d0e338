"""A memory as parameters, trained by plain optimizers."""

import copy
import pickle
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdam
from tests.cases import alike, close, every_kind_in_full, problem
from tests.helpers import check_derivatives, clouds, gaussians, mixtures, near


@every_kind_in_full
def test_there_and_back(rng, kind):
    memory, query = problem(rng, kind)
    params, rebuild = jdam.parametrize(memory)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    again = rebuild(params)
    assert jax.tree.structure(again) == jax.tree.structure(memory)
    alike(again.patterns, memory.patterns, rtol=1e-13, atol=1e-13)
    energy = jax.jit(lambda params: jdam.energy(rebuild(params), query, 2.0))
    close(energy(params), jdam.energy(memory, query, 2.0), rtol=1e-9, atol=1e-9)
    chex.assert_tree_all_finite(jax.grad(energy)(params))


@pytest.mark.full
@every_kind_in_full
def test_any_values_are_a_memory(rng, kind):
    memory, query = problem(rng, kind)
    params, rebuild = jdam.parametrize(memory, ("patterns", "prior"))
    wild = jax.tree.map(lambda leaf: jnp.asarray(3 * rng.normal(size=leaf.shape)), params)
    moved = rebuild(wild)
    for field in ("weights", "probabilities"):
        if hasattr(moved.patterns, field):
            np.testing.assert_allclose(getattr(moved.patterns, field).sum(1), 1, rtol=1e-12)
    if hasattr(moved.patterns, "scale"):
        assert (moved.patterns.scale >= 0).all()
    stored = jdam.store(moved.patterns, moved.geometry, log_prior=moved.log_prior)
    found, wanted = (jdam.divergences(m, query) for m in (moved, stored))
    close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.full
def test_a_memory_of_clouds_learns_by_plain_adam(rng):
    """Sixty steps, points, weights and ε; what comes out is as if it had been stored."""
    ragged = [rng.normal(size=(n, 2)).astype("f4") for n in (4, 6, 5)]
    patterns = jdam.PointCloud.from_ragged(ragged)
    memory = jdam.store(patterns, jdam.Sinkhorn(0.3, hellinger_scale=0.5))
    targets = clouds(rng, 6, 2, n=5, dtype=np.float32)
    params, rebuild = jdam.parametrize(memory, ("patterns", "epsilon"))
    assert set(params) == {"patterns", "epsilon"}
    optimizer = optax.adam(0.05)

    def loss(params):
        return jdam.pairwise(rebuild(params), targets).min(1).mean()

    @jax.jit
    def update(params, state):
        value, slope = jax.value_and_grad(loss)(params)
        change, state = optimizer.update(slope, state)
        return optax.apply_updates(params, change), state, value

    state, losses = optimizer.init(params), []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for _ in range(60):
            params, state, value = update(params, state)
            losses.append(float(value))
    assert losses[-1] < 2 / 3 * losses[0]
    learned = rebuild(params)
    weights = np.asarray(learned.patterns.weights)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(weights == 0, np.asarray(patterns.weights) == 0)
    assert float(learned.geometry.epsilon) != float(memory.geometry.epsilon)
    assert float(learned.geometry.hellinger_scale) == 0.5
    stored = jdam.store(learned.patterns, learned.geometry)
    close(
        jdam.divergences(learned, targets[0]),
        jdam.divergences(stored, targets[0]),
        rtol=1e-4,
        atol=1e-6,
    )
    status = jdam.recall(learned, targets[0], 5.0, max_steps=3).status
    assert int(status) != jdam.Status.NONFINITE


@pytest.mark.full
def test_derivatives(rng):
    memory = jdam.store(clouds(rng, 2, 2, n=3), jdam.Sinkhorn(0.5, rho=1.0, hellinger_scale=0.2))
    query = near(rng, memory[0], 0.2)
    params, rebuild = jdam.parametrize(memory, ("patterns", "prior", "epsilon", "rho"))
    check_derivatives(lambda p: jdam.energy(rebuild(p), query, 2.0), (params,), rtol=1e-4)


def test_what_is_not_learned_stays(rng):
    prior = np.array([0.0, -1.0, -np.inf])
    memory = jdam.store(gaussians(rng, 3, 2), log_prior=prior, capacity=5)
    params, rebuild = jdam.parametrize(memory, ("prior",))
    assert params["prior"].shape == (5,)
    moved = rebuild({"prior": params["prior"] + 1})
    assert moved.log_prior.tolist() == [1, 0, *[-np.inf] * 3]
    assert moved.patterns is memory.patterns
    assert len(moved) == 3
    close(moved.prepared, memory.prepared, rtol=0)
    params, rebuild = jdam.parametrize(memory)
    grown = rebuild(params).append(memory[0])
    assert (len(grown), grown.capacity) == (4, 5)


def test_ways_back_are_equal_that_keep_the_same(rng):
    memory = jdam.store(clouds(rng, 3, 2), jdam.Sinkhorn(0.5), log_prior=np.zeros(3))
    rebuild = jdam.parametrize(memory)[1]
    again = pickle.loads(pickle.dumps(rebuild))
    moved = jdam.PointCloud(memory.patterns.points + 1, memory.patterns.weights)
    others = [jdam.parametrize(jdam.store(moved, jdam.Sinkhorn(e), log_prior=np.zeros(3)))[1] for e in (0.5, 0.6)]  # fmt: skip
    assert rebuild == again == copy.deepcopy(rebuild) == others[0]
    assert len({rebuild, again, others[0]}) == 1
    assert rebuild != others[1]
    assert rebuild != jdam.parametrize(memory, ("patterns", "prior"))[1]
    assert rebuild != "rebuild"
    switched = jdam.store(memory.patterns, memory.geometry, log_prior=[0.0, 0.0, -np.inf])
    assert rebuild != jdam.parametrize(switched)[1]
    pad = jdam.PointCloud.from_ragged([cloud.points[:n] for cloud, n in zip(memory, (5, 6, 6), strict=True)])  # fmt: skip
    assert rebuild != jdam.parametrize(jdam.store(pad, memory.geometry, log_prior=np.zeros(3)))[1]
    params = jdam.parametrize(memory)[0]

    @partial(jax.jit, static_argnums=1)
    @chex.assert_max_traces(n=1)
    def run(params, rebuild):
        return rebuild(params).patterns.points

    for way in (rebuild, again, others[0]):
        np.testing.assert_array_equal(run(params, way), memory.patterns.points)


@pytest.mark.full
def test_halves_are_learned_in_single_precision(rng):
    patterns = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), gaussians(rng, 3, 2))
    params, rebuild = jdam.parametrize(jdam.store(patterns))
    assert params["patterns"]["mean"].dtype == jnp.float32
    assert rebuild(params).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("learn", "error", "message"),
    [
        (("weights",), ValueError, r"learn must be a tuple of some of \('patterns', 'prior', 'eps"),
        (("rho",), ValueError, "learn must be a tuple of some of .*; got 'rho'"),
        (("hellinger_scale",), ValueError, "hellinger_scale must be > 0 to be learned; got 0"),
        ("patterns", ValueError, "learn must be a tuple of names"),
        ((), ValueError, "learn must be a tuple of names"),
    ],
)
def test_bad_names(rng, learn, error, message):
    memory = jdam.store(clouds(rng, 2, 2), jdam.Sinkhorn(0.5))
    with pytest.raises(error, match=message):
        jdam.parametrize(memory, learn)
    with pytest.raises(TypeError, match="memory must be a jdam.Memory; got PointCloud"):
        jdam.parametrize(memory.patterns)


def test_bad_memories_and_params(rng):
    memory = jdam.store(gaussians(rng, 2, 2))
    params, rebuild = jdam.parametrize(memory)
    with pytest.raises(ValueError, match=r"params must have the names \('patterns',\); got"):
        rebuild(params | {"prior": jnp.zeros(2)})
    sharded = jdam.shard(memory, jax.make_mesh((1,), ("patterns",)), "patterns")
    with pytest.raises(ValueError, match="memory must not be sharded"):
        jdam.parametrize(sharded)


@pytest.mark.full
def test_mixtures_in_any_pose_are_learned(rng):
    patterns = mixtures(rng, 2, 2)
    memory = jdam.store(patterns, jdam.Aligned(jdam.MixtureWasserstein(), num_starts=4))
    params, rebuild = jdam.parametrize(memory)
    query = near(rng, patterns[0], 0.1)
    gradient = jax.grad(lambda params: jdam.energy(rebuild(params), query, 1.0))(params)
    chex.assert_tree_all_finite(gradient)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradient))
