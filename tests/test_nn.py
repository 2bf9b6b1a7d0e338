"""Attention over learned measures, as a layer."""

import copy
import pickle

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdam
from tests.cases import only_full
from tests.helpers import clouds, gaussians, near

MAKES = {"gaussians": (gaussians, jdam.Bures()), "clouds": (clouds, jdam.Sinkhorn(0.5))}


def setting(rng, kind):
    make, geometry = MAKES[kind]
    keys = make(rng, 6, 2, dtype=np.float32)
    memory = jdam.store(jax.tree.map(lambda leaf: leaf[:4], keys), geometry)
    queries = near(rng, jax.tree.map(lambda leaf: leaf[np.arange(12) % 6], keys), 0.2)
    return memory, queries, jnp.arange(12, dtype=jnp.int32) % 3


@pytest.mark.full
@pytest.mark.parametrize("kind", ["gaussians", *only_full("clouds")])
def test_it_is_attention_and_learns(rng, kind):
    memory, queries, labels = setting(rng, kind)
    layer = jdam.nn.MeasureAttention(memory, 3, key=jax.random.key(0))
    start = layer.keys
    found = jax.vmap(layer)(queries)
    wanted = jdam.attend(memory, queries[1], jdam.suggest_beta(memory), layer.values)
    np.testing.assert_allclose(found[1], wanted, rtol=1e-3, atol=1e-4)
    optimizer = optax.adam(0.05)

    @eqx.filter_jit
    def update(layer, state):
        @eqx.filter_value_and_grad
        def loss(layer):
            logits = jax.vmap(layer)(queries)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, slope = loss(layer)
        change, state = optimizer.update(slope, state)
        return eqx.apply_updates(layer, change), state, value

    state, losses = optimizer.init(eqx.filter(layer, eqx.is_inexact_array)), []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for _ in range(40):
            layer, state, value = update(layer, state)
            losses.append(float(value))
    assert losses[-1] < 0.6 * losses[0]
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(layer.keys), strict=True):
        assert not np.array_equal(before, after)
    assert float(layer.beta) > 0
    if kind == "clouds":
        np.testing.assert_allclose(layer.memory.patterns.weights.sum(1), 1, rtol=1e-6)


@pytest.mark.full
def test_what_is_a_parameter(rng):
    memory, queries, _ = setting(rng, "gaussians")

    def names(layer):
        return {path[0].name for path, _ in jax.tree_util.tree_leaves_with_path(layer)}

    values = jnp.ones((4, 2, 5), jnp.float32)
    assert names(jdam.nn.MeasureAttention(memory, values)) == {"keys", "values", "log_beta"}
    fixed = jdam.nn.MeasureAttention(memory, values, beta=3.0, learn=())
    assert names(fixed) == {"values"}
    assert (float(fixed.beta), fixed(queries[0]).shape) == (3.0, (2, 5))
    prior = jdam.nn.MeasureAttention(memory, values, beta=3.0, learn=("prior",))
    assert set(prior.keys) == {"prior"}
    sharp = prior(queries[0], beta=1e4, key=None)
    np.testing.assert_allclose(sharp, jdam.attend(memory, queries[0], 1e4, values))
    sparse = jdam.nn.MeasureAttention(memory, values, beta=3.0, separation=jdam.Entmax())
    np.testing.assert_allclose(sparse(queries[0]), values[0], rtol=1e-6)


@pytest.mark.full
def test_layers_of_one_memory_have_one_structure(rng):
    memory, queries, _ = setting(rng, "gaussians")
    first, second = (jdam.nn.MeasureAttention(memory, 3, key=jax.random.key(i)) for i in (0, 1))
    mean = jax.tree.map(lambda x, y: (x + y) / 2, first, second)
    np.testing.assert_allclose(mean(queries[0]).shape, (3,))
    other = jdam.nn.MeasureAttention(memory.append(memory[0]), 3, key=jax.random.key(0))
    assert jax.tree.structure(other) != jax.tree.structure(first)


def padded(rng):
    """Clouds, of which some have atoms of weight 0, in a memory with room."""
    ragged = [rng.normal(size=(n, 2)).astype("f4") for n in (3, 4, 4)]
    return jdam.store(jdam.PointCloud.from_ragged(ragged), jdam.Sinkhorn(0.5), capacity=4)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "learn"),
    [
        ("gaussians", ("patterns", "beta")),
        ("gaussians", ()),
        ("padded clouds", ("patterns", "prior")),
    ],
)
def test_copies_can_be_averaged_and_stacked_and_compile_nothing(rng, kind, learn):
    memory = padded(rng) if kind == "padded clouds" else setting(rng, kind)[0]
    query = memory[0]

    def make(memory, key=0):
        key = jax.random.key(key)
        return jdam.nn.MeasureAttention(memory, 3, beta=2.0, learn=learn, key=key)

    @eqx.filter_jit
    @chex.assert_max_traces(n=1)
    def call(layer, query):
        return layer(query)

    layer = make(memory)
    wanted = call(layer, query)
    alike = jdam.store(memory[:], memory.geometry, capacity=memory.capacity)
    built = make(alike if memory.size is not None else jdam.store(memory[:]))
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), built]
    for other in copies:
        assert hash(other.rebuild) == hash(layer.rebuild)
        np.testing.assert_array_equal(call(other, query), wanted)
        target = jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, other, layer)
        np.testing.assert_allclose(call(target, query), wanted, rtol=1e-4, atol=1e-5)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), layer, *copies)
    found = eqx.filter_vmap(lambda layer: layer(query))(stacked)
    np.testing.assert_allclose(found, jnp.stack([wanted] * 4), rtol=1e-4, atol=1e-5)
    keys = jnp.arange(2, dtype=jnp.uint32)
    several = eqx.filter_vmap(lambda key: make(memory, key))(keys)
    found = eqx.filter_vmap(lambda layer: layer(query))(several)
    np.testing.assert_allclose(found[1], call(make(memory, 1), query), rtol=1e-4, atol=1e-5)
    skeleton = eqx.filter_eval_shape(lambda: make(memory))
    assert jax.tree.structure(skeleton) == jax.tree.structure(layer)


@pytest.mark.full
def test_layers_of_other_patterns_can_be_stacked(rng):
    """For these are learned: only what is not must be the same."""
    memory, queries, _ = setting(rng, "gaussians")
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), memory.patterns)

    def make(patterns):
        values = jnp.eye(4, dtype=jnp.float32)
        return jdam.nn.MeasureAttention(jdam.store(patterns), values, beta=1.0)

    single = [make(jax.tree.map(lambda leaf, i=i: leaf[i], both)) for i in (0, 1)]
    wanted = jnp.stack([layer(queries[0]) for layer in single])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single)
    for layers in (stacked, eqx.filter_vmap(make)(both)):
        found = eqx.filter_vmap(lambda layer: layer(queries[0]))(layers)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    skeleton = eqx.filter_eval_shape(make, memory.patterns)
    assert jax.tree.structure(skeleton) == jax.tree.structure(single[0])
    with pytest.raises(ValueError, match="memory must be known outside of jax.jit and jax.vmap"):
        eqx.filter_vmap(
            lambda patterns: jdam.nn.MeasureAttention(
                jdam.store(patterns), jnp.ones((4, 1), jnp.float32), beta=1.0, learn=("prior",)
            )
        )(both)
    with pytest.raises(ValueError, match="beta must be known outside of jax.jit and jax.vmap"):
        eqx.filter_vmap(
            lambda beta: jdam.nn.MeasureAttention(
                memory, jnp.ones((4, 1), jnp.float32), beta=beta, learn=("patterns",)
            )
        )(jnp.ones(2, jnp.float32))


def test_it_can_be_saved_as_equinox_does(rng, tmp_path):
    memory, queries, _ = setting(rng, "gaussians")
    layer, other = (jdam.nn.MeasureAttention(memory, 3, key=jax.random.key(i)) for i in (0, 1))
    eqx.tree_serialise_leaves(tmp_path / "layer", layer)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "layer", other)
    np.testing.assert_array_equal(loaded(queries[0]), layer(queries[0]))


def test_bad_arguments(rng):
    memory, _, _ = setting(rng, "gaussians")
    for values, error, message in (
        (3, TypeError, "key must be given to draw values"),
        (
            np.zeros((3, 2), "f4"),
            ValueError,
            r"values must have shape \(N, …\), N = 4; got \(3, 2\)",
        ),
        (0, ValueError, "values must be ≥ 1"),
        (
            np.arange(4),
            TypeError,
            "values must have a floating dtype; got int.*: for labels pass a",
        ),
    ):
        key = jax.random.key(0) if error is ValueError else None
        with pytest.raises(error, match=message):
            jdam.nn.MeasureAttention(memory, values, key=key)
    with pytest.raises(ValueError, match="beta must be finite and > 0"):
        jdam.nn.MeasureAttention(memory, np.zeros((4, 1), "f4"), beta=-1.0)
    with pytest.raises(ValueError, match="learn must be a tuple of some of"):
        jdam.nn.MeasureAttention(memory, np.zeros((4, 1), "f4"), learn=("values",))
