"""A memory with room to grow is the memory of what it holds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

import jdam
from tests.cases import KINDS, alike, all_of, close, every_kind_in_full, gaussians_and_clouds
from tests.helpers import clouds, diagonals, gaussians, mixtures, near, vectors

CAPACITY, BETA = 8, 3.0


def rows(patterns, start, stop):
    return jax.tree.map(lambda leaf: leaf[start:stop], patterns)


def single(patterns, i):
    return jax.tree.map(lambda leaf: leaf[i], patterns)


def grown(patterns, geometry, **options):
    """Two patterns, then one, then the rest at once, in one of many places."""
    memory = jdam.store(rows(patterns, 0, 2), geometry, capacity=CAPACITY, **options)
    return memory.append(single(patterns, 2)).append(rows(patterns, 3, None))


def pair(rng, kind, num=5, d=5):
    """A grown memory, the stored one, and a query."""
    make, geometry = KINDS[kind]
    patterns = make(rng, num, d)
    stored = jdam.store(patterns, geometry)
    return grown(patterns, geometry), stored, near(rng, stored[2], 0.1)


@pytest.mark.full
@every_kind_in_full
def test_energies_and_steps(rng, kind):
    memory, stored, query = pair(rng, kind)
    found, wanted = all_of(memory, query, BETA), all_of(stored, query, BETA)
    assert (np.asarray(found[0][5:]) == np.inf).all()
    assert (np.asarray(found[2][5:]) == 0).all()
    close([found[0][:5], found[1], found[2][:5]], wanted[:3], rtol=1e-9, atol=1e-9)
    alike(found[3], wanted[3], rtol=1e-8, atol=1e-8)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "search"),
    [
        ("gaussian", jdam.Exhaustive()),
        ("gaussian", jdam.Certified(2)),
        ("euclidean", jdam.Certified(2)),
        ("clouds", jdam.Certified(2)),
        ("one-sided", jdam.Exhaustive()),
    ],
)
def test_recall(rng, kind, search):
    memory, stored, query = pair(rng, kind)
    recall = jax.jit(partial(jdam.recall, max_steps=3, search=search))
    found, wanted = recall(memory, query, BETA), recall(stored, query, BETA)
    assert (found.nearest, found.status) == (wanted.nearest, wanted.status)
    alike(found.measure, wanted.measure, rtol=1e-7, atol=1e-7)
    close(found.energy, wanted.energy, rtol=1e-9, atol=1e-9)


@pytest.mark.full
def test_tolerances_do_not_see_free_places(rng):
    for kind in ("gaussian", "clouds", "sliced, from outside"):
        memory, stored, _ = pair(rng, kind)
        close(memory.magnitudes(), stored.magnitudes(), rtol=1e-14)


@pytest.mark.full
@pytest.mark.parametrize("separation", [jdam.Entmax(), jdam.Epanechnikov()])
@pytest.mark.parametrize("beta", [0.05, 1e4])
def test_other_separations(rng, separation, beta):
    memory, stored, query = pair(rng, "euclidean")
    for function in (jdam.energy, jdam.step):
        found, wanted = (function(m, query, beta, separation=separation) for m in (memory, stored))
        close(found, wanted, rtol=1e-10, atol=1e-10)
    recalled = jdam.recall(memory, query, beta, separation=separation)
    wanted = jdam.recall(stored, query, beta, separation=separation)
    assert (recalled.nearest, recalled.status) == (wanted.nearest, wanted.status)


@pytest.mark.full
def test_derivatives_of_what_is_free_are_zero(rng):
    memory, stored, query = pair(rng, "gaussian")

    def energy(patterns, m):
        held = jdam.store(patterns, m.geometry, log_prior=m.log_weights)
        return jdam.energy(held, query, BETA)

    slope = jax.jit(jax.grad(energy))
    found, wanted = slope(memory.patterns, memory), slope(stored.patterns, stored)
    close(rows(found, 0, 5), wanted, rtol=1e-9, atol=1e-9)
    for leaf in jax.tree.leaves(rows(found, 5, None)):
        assert not np.asarray(leaf).any()


@pytest.mark.full
def test_theory(rng):
    memory, stored, query = pair(rng, "euclidean")
    theory = jdam.theory
    for function in (theory.separations, partial(theory.basin_radius, beta=BETA)):
        found = function(memory)
        close(found[:5], function(stored), rtol=1e-2)  # bounds, which depend on the search
        assert (np.asarray(found[5:]) == np.inf).all()
    error = 0.01
    close(theory.minimum_beta(memory, error), theory.minimum_beta(stored, error), rtol=1e-6)
    beta = theory.minimum_beta(stored, error)
    found, wanted = (theory.certify(m, query, beta) for m in (memory, stored))
    close(found, wanted, rtol=1e-6)
    with pytest.raises(IndexError, match="index 5 is out of range"):
        theory.one_step_bound(memory, 5, 0.1, BETA)


@pytest.mark.full
def test_theory_sees_no_free_place(rng):
    """Copies of the last pattern are in them; and −1 is that pattern, not the last place."""
    patterns = diagonals(rng, 6, 3)
    patterns = jdam.DiagonalGaussian(0.01 * patterns.mean, patterns.scale)
    memory, stored = jdam.store(patterns, capacity=100), jdam.store(patterns)
    for function in (jdam.theory.separations, jdam.theory.transition_beta):
        close(function(memory)[:6], function(stored), rtol=1e-6)
    for bound in (jdam.theory.one_step_bound, jdam.theory.contraction_bound):
        expected = bound(stored, 5, 0.01, 20.0)
        close(bound(memory, -1, 0.01, 20.0), expected, rtol=1e-6)
        close(bound(stored, -1, 0.01, 20.0), expected, rtol=1e-12)


@pytest.mark.full
def test_weight_stiffness(rng):
    memory, stored, _ = pair(rng, "clouds")
    found = jdam.theory.weight_stiffness(memory)
    close(found, np.append(jdam.theory.weight_stiffness(stored), [0, 0, 0]), rtol=1e-9)


@pytest.mark.full
def test_values_for_patterns_and_for_places(rng):
    memory, stored, query = pair(rng, "gaussian")
    values = rng.normal(size=(CAPACITY, 2))
    wanted = jdam.attend(stored, query, BETA, values[:5])
    for given in (values, values[:5]):
        close(jdam.attend(memory, query, BETA, given), wanted, rtol=1e-10)
    completed = jdam.attend(memory, query, BETA, memory)
    alike(completed, jdam.attend(stored, query, BETA, stored), rtol=1e-8, atol=1e-8)
    alike(completed, jdam.attend(stored, query, BETA, memory), rtol=1e-8, atol=1e-8)
    values[5:] = np.nan
    close(jdam.attend(memory, query, BETA, values), wanted, rtol=1e-10)
    message = "values must have one entry for each of the 5 patterns, or of its 8 places; got 6"
    with pytest.raises(ValueError, match=message):
        jdam.attend(memory, query, BETA, values[:6])
    with pytest.raises(ValueError, match="for each of the 5 patterns, .*; got 4"):
        jdam.attend(memory, query, BETA, memory.remove(0))


@pytest.fixture
def compilations():
    """A list that grows by one with every program that is compiled."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    yield seen
    monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("make", [gaussians, vectors, clouds])
def test_nothing_recompiles_while_there_is_room(rng, make, compilations):
    geometry = jdam.Sinkhorn(0.4) if make is clouds else None
    patterns = jax.tree.map(np.asarray, make(rng, 31, 2, dtype=np.float32))
    memory = jdam.store(rows(patterns, 0, 2), geometry, capacity=31)
    compilations.clear()
    for i in range(2, 31):
        memory = memory.append(single(patterns, i))
        found = jdam.recall(memory, single(patterns, i), 1e3, max_steps=3)
        assert int(found.nearest) == i
    assert len(compilations) <= 2
    assert len(memory) == 31


@pytest.mark.full
@gaussians_and_clouds
def test_inside_jit_and_scan(rng, kind):
    make, geometry = KINDS[kind]
    patterns = make(rng, 6, 5)
    memory = jdam.store(rows(patterns, 0, 2), geometry, capacity=CAPACITY)

    @jax.jit
    def run(memory, more):
        def turn(memory, pattern):
            memory = memory.append(pattern).replace(0, pattern)
            return memory, memory.size

        memory, sizes = jax.lax.scan(turn, memory, more)
        return memory.remove(jnp.array([1, -1])), sizes

    found, sizes = run(memory, rows(patterns, 2, None))
    assert sizes.tolist() == [3, 4, 5, 6]
    assert len(found) == 4
    wanted = jdam.store(patterns, geometry).replace(0, single(patterns, 5)).remove([1, 5])
    alike(found[:], wanted[:], rtol=1e-12)
    query = near(rng, wanted[1], 0.1)
    close(jdam.energy(found, query, BETA), jdam.energy(wanted, query, BETA), rtol=1e-9, atol=1e-9)


@pytest.mark.full
def test_append_copies_and_prepares_its_own_patterns_only(rng):
    """In place, if the memory may be used up; what it needs beside does not depend on N."""
    extra = []
    for capacity in (64, 4096):
        memory = jdam.store(gaussians(rng, 2, 4), capacity=capacity)
        append = jax.jit(jdam.Memory.append, donate_argnums=0)
        used = append.lower(memory, memory[0]).compile().memory_analysis()
        extra.append(used.temp_size_in_bytes)
        assert used.alias_size_in_bytes >= capacity * (4 + 16) * 8
    assert extra[1] == extra[0]


def test_more_than_there_is_room_for(rng):
    patterns = gaussians(rng, 4, 3)
    memory = jdam.store(rows(patterns, 0, 3), capacity=4)
    full = memory.append(single(patterns, 3))
    assert len(full) == full.capacity == 4
    message = r"patterns must be at most 0, .* capacity 4; got 1: memory.reserve\(8\) doubles it"
    with pytest.raises(ValueError, match=message):
        full.append(patterns[0])
    with pytest.raises(ValueError, match="patterns must be at most 1, .*; got 4"):
        memory.append(patterns)
    longer = full.reserve(8).append(patterns)
    assert (len(longer), longer.capacity) == (8, 8)
    with pytest.raises(ValueError, match="capacity must be ≥ N = 8; got 7"):
        longer.reserve(7)
    with pytest.raises(ValueError, match="capacity must be ≥ N = 4; got 3"):
        jdam.store(patterns, capacity=3)
    with pytest.raises(TypeError, match="capacity must be an int"):
        jdam.store(patterns, capacity=8.0)


LARGER = {
    "clouds": (partial(clouds, n=4), partial(clouds, n=7), {"n": 7}),
    "gaussians": (partial(gaussians, rank=2), partial(gaussians, rank=4), {"r": 4}),
    "mixtures": (
        partial(mixtures, components=2, rank=2),
        partial(mixtures, components=4, rank=3),
        {"K": 4, "r": 3},
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("kind", LARGER)
def test_room_for_larger_patterns(rng, kind):
    """As if all had been stored together, which fills them up."""
    small, large, sizes = LARGER[kind]
    geometry = jdam.Sinkhorn(0.4) if kind == "clouds" else None
    few, more = small(rng, 3, 3), large(rng, 2, 3)
    memory = jdam.store(few, geometry, capacity=5)
    named = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    way_out = rf"got {named}: memory.reserve\(5, {named}\) makes room"
    for change in (lambda: memory.append(more), lambda: memory.replace(1, more[0])):
        with pytest.raises(ValueError, match=way_out):
            change()
    roomy = memory.reserve(5, **sizes)
    assert (len(roomy), roomy.capacity) == (3, 5)
    assert roomy.patterns.sizes == more.sizes
    alike(roomy[:2], few.padded(**sizes)[:2], rtol=1e-15)
    stored = jdam.store(few, geometry).append(more)
    query = near(rng, stored[3], 0.1)
    found = jdam.divergences(roomy.append(more), query)
    close(found, jdam.divergences(stored, query), rtol=1e-9, atol=1e-9)
    changed = jax.jit(lambda m: m.reserve(5, **sizes).replace(0, more[0]))(memory)
    close(jdam.divergences(changed, query)[0], found[3], rtol=1e-9, atol=1e-9)
    assert jdam.store(few, geometry).reserve(3, **sizes).append([]).capacity == 3


def test_sizes_that_there_are_not(rng):
    memory = jdam.store(clouds(rng, 3, 2, n=5), jdam.Sinkhorn(0.4))
    with pytest.raises(ValueError, match="n must be ≥ 5; got 4"):
        memory.reserve(8, n=4)
    with pytest.raises(TypeError, match="n must be an int; got 8.0"):
        memory.reserve(8, n=8.0)
    with pytest.raises(ValueError, match=r"sizes must be some of \('n',\) for .*; got r=4"):
        memory.reserve(8, r=4)
    message = r"sizes must be left out for DiagonalGaussian\(dim=2\); got n=4"
    with pytest.raises(ValueError, match=message):
        jdam.store(diagonals(rng, 3, 2)).reserve(8, n=4)
    with pytest.raises(ValueError, match=r"sizes must be left out for vectors\(dim=2\); got n=4"):
        jdam.store(vectors(rng, 3, 2)).reserve(8, n=4)


def test_a_memory_with_room_has_a_length_inside_jit_if_it_is_known(rng):
    memory = jdam.store(vectors(rng, 3, 2), capacity=5)
    values = rng.normal(size=(3, 2))
    found = jax.jit(lambda query: jdam.attend(memory, query, BETA, values))(memory[0])
    close(found, jdam.attend(jdam.store(memory[:]), memory[0], BETA, values), rtol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize(
    "change",
    [
        lambda memory, pattern: memory.append(pattern).append(pattern).remove(0),
        lambda memory, pattern: memory.remove(jnp.arange(3)).append(pattern),
        lambda memory, pattern: memory.append(pattern).append(pattern),
        lambda memory, pattern: memory.replace(jnp.array(3), pattern),
        lambda memory, pattern: memory.remove(jnp.array([-4])),
        lambda memory, pattern: memory.remove(jnp.arange(3)),
    ],
)
def test_what_cannot_raise_inside_jit_is_not_finite(rng, change):
    for geometry, make in ((jdam.Bures(), gaussians), (jdam.Euclidean(), vectors)):
        patterns = make(rng, 3, 3)
        memory = jdam.store(patterns, geometry, capacity=4)
        changed = jax.jit(change)(memory, memory[0])
        for search in (jdam.Exhaustive(), jdam.Certified()):
            found = jdam.recall(changed, memory[0], BETA, search=search)
            assert jdam.Status(int(found.status)) is jdam.Status.NONFINITE
        assert np.isnan(jdam.divergences(changed, memory[0])).all()
        assert "-1 of 4" in repr(changed)
        with pytest.raises(ValueError, match="the memory was overfilled inside jax.jit"):
            len(changed)


def test_priors_of_what_is_added_and_left(rng):
    memory = jdam.store(vectors(rng, 3, 2), log_prior=[0.0, -np.inf, -np.inf], capacity=5)
    off = memory.append(memory[0], -np.inf)
    assert off.log_prior.tolist() == [0, *[-np.inf] * 4]
    assert len(off) == 4
    for held in (off, jdam.store(off[:], log_prior=off.log_prior[:4])):
        with pytest.raises(ValueError, match="log_prior must leave a pattern on"):
            held.remove(0)
    assert off.append([]) is off
    with pytest.raises(IndexError, match="indices must be in"):
        off.remove(2**32)


@pytest.mark.full
def test_a_batch_of_memories(rng):
    memory = jdam.store(vectors(rng, 3, 2), capacity=5)
    many = jax.vmap(memory.append)(vectors(rng, 4, 2))
    assert "… of" in repr(many)
    with pytest.raises(TypeError, match=r"a batch \(4,\) of memories has no length"):
        len(many)


@pytest.mark.full
def test_replace_without_a_capacity(rng):
    memory = jdam.store(gaussians(rng, 4, 3), log_prior=np.arange(4.0))
    others = gaussians(rng, 2, 3, rank=2)
    changed = memory.replace([3, 0], others)
    assert changed.log_prior.tolist() == [0, 1, 2, 3]
    alike(changed[3], others[0], rtol=1e-15)
    alike(changed[0], others[1], rtol=1e-15)
    alike(changed[1], memory[1], rtol=0)
    close(jdam.divergences(changed, changed[0])[0], 0, atol=1e-12)
    with pytest.raises(IndexError, match="indices must be in"):
        memory.replace(4, others[0])
    with pytest.raises(ValueError, match="indices must be 2, one for each of patterns"):
        memory.replace([1], others)
    with pytest.raises(ValueError, match="patterns must have r ≤ 3, for which .*; got r=5"):
        memory.replace(0, gaussians(rng, 1, 3, rank=5)[0])
    lost = jax.jit(lambda m, i: m.replace(i, others[0]))(memory, 9)
    assert int(jdam.recall(lost, memory[1], BETA).status) == jdam.Status.NONFINITE


def test_length_indexing_iteration_repr(rng):
    memory, stored, _ = pair(rng, "gaussian")
    assert repr(memory) == "Memory(5 of 8 × Gaussian(dim=5, rank=5), Bures(), float64)"
    assert (len(memory), len(list(memory)), memory.capacity) == (5, 5, 8)
    for index in (-1, 2, slice(1, None), np.array([0, -1])):
        alike(memory[index], stored[index], rtol=1e-15)
    for index in (5, -6):
        with pytest.raises(IndexError, match="is out of range for a memory of 5"):
            memory[index]
    with_prior = grown(stored.patterns, stored.geometry, log_prior=np.array([0.0, -1.0]))
    assert repr(with_prior).endswith("float64, log_prior)")
    assert with_prior.log_prior.tolist() == [0, -1, 0, 0, 0, *[-np.inf] * 3]

    def inside(memory):
        assert "… of 8 ×" in repr(memory)
        with pytest.raises(TypeError, match="no length inside jax.jit: memory.size is the traced"):
            len(memory)
        return memory[memory.size - 1], memory[jnp.asarray(-1)], memory[-1], memory[4]

    for last in jax.jit(inside)(memory):
        alike(last, stored[4], rtol=1e-15)


def test_remove_keeps_the_order_and_the_prior(rng):
    patterns = vectors(rng, 6, 2)
    memory = jdam.store(patterns, log_prior=np.arange(6.0), capacity=7).remove([1, -2, 1])
    np.testing.assert_array_equal(memory[:], np.asarray(patterns)[[0, 2, 3, 5]])
    assert memory.log_prior.tolist() == [0, 2, 3, 5, *[-np.inf] * 3]
    assert len(memory.append(patterns[0])) == 5
    with pytest.raises(ValueError, match="indices must leave at least one"):
        memory.remove(range(4))
    with pytest.raises(TypeError, match="indices must be known outside of jax.jit"):
        jax.jit(lambda m, i: m.remove(i))(jdam.store(patterns), 1)


@pytest.mark.full
def test_halves(rng):
    patterns = diagonals(rng, 3, 2, dtype=np.float32)
    patterns = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), patterns)
    memory = jdam.store(patterns, capacity=4).append(patterns[0])
    close(
        jdam.divergences(memory, patterns[1]), jdam.divergences(jdam.store(memory[:]), patterns[1])
    )
