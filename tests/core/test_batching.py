"""The three primitives of batching: values, derivatives, and how much is computed at once."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jdam._core.batching import in_batches, map_in_batches, masked_cond

SIZES: list[int] = []


@jax.custom_batching.custom_vmap
def seen(x):
    return jnp.sin(x)


@seen.def_vmap
def _(size, batched, x):
    jax.debug.callback(lambda: SIZES.append(size))
    return jnp.sin(x), True


def sizes_seen(function, *args):
    SIZES.clear()
    found = jax.block_until_ready(jax.jit(function)(*args))
    jax.effects_barrier()
    return found, sorted(SIZES)


@pytest.mark.parametrize("size", [1, 4, 5, 8])
def test_chunks_are_equal_and_the_last_is_filled(rng, size):
    x = rng.normal(size=size)
    found, sizes = sizes_seen(partial(map_in_batches, seen, 4), x)
    np.testing.assert_allclose(found, np.sin(x))
    width = -(-size // -(-size // 4))
    assert sizes == [width] * -(-size // 4)


def test_no_rows():
    assert map_in_batches(jnp.sin, 4, jnp.zeros(0)).shape == (0,)


@pytest.mark.parametrize("flat", [False, True])
def test_tiles(rng, flat):
    """Of nested batches the inner is tiled; flat, all of it is."""
    x = rng.normal(size=(3, 6))
    tiled = partial(in_batches, seen, 2, flat=flat)
    found, sizes = sizes_seen(jax.vmap(tiled), x[0])
    np.testing.assert_allclose(found, np.sin(x[0]))
    assert sizes == [2, 2, 2]
    found, sizes = sizes_seen(jax.vmap(jax.vmap(tiled)), x)
    np.testing.assert_allclose(found, np.sin(x))
    if flat:
        assert sizes == [2] * 9


def test_what_a_batch_shares_is_not_copied(rng):
    shared = rng.normal(size=1000)
    batch = jax.jit(jax.vmap(partial(in_batches, lambda x, y: x * y.sum(), 2), (0, None)))
    needed = batch.lower(jnp.arange(64.0), shared).compile().memory_analysis()
    assert needed.temp_size_in_bytes < 8 * 1000 * 8


def cube(x, shift):
    return seen(x) ** 3 + shift


@pytest.mark.parametrize("at_once", [None, 2])
def test_only_what_is_wanted_is_computed(rng, at_once):
    x, wanted = rng.normal(size=8), np.arange(8) % 3 == 0
    where = partial(masked_cond, at_once=at_once)

    def one(wanted, x, shift):
        return where(wanted, cube, -x, x, shift)

    batch = jax.vmap(one, (0, 0, None))
    found, sizes = sizes_seen(batch, wanted, x, 2.0)
    np.testing.assert_allclose(found, np.where(wanted, np.sin(x) ** 3 + 2, -x))
    assert sizes == ([8] if at_once is None else [2, 2])  # three are wanted
    found, sizes = sizes_seen(batch, np.zeros(8, bool), x, 2.0)
    np.testing.assert_allclose(found, -x)
    assert sizes == []
    grid = jax.vmap(batch, (0, 0, 0))
    twice, shifts = np.stack([wanted, ~wanted]), np.array([1.0, 2.0])
    found, _ = sizes_seen(grid, twice, np.stack([x, x]), shifts)
    expected = np.where(twice, np.sin(x) ** 3 + shifts[:, None], -x)
    np.testing.assert_allclose(found, expected)


@pytest.mark.full
@pytest.mark.parametrize("flat", [False, True])
def test_derivatives_are_those_of_the_function(rng, flat):
    x, shift = jnp.asarray(rng.normal(size=5)), jnp.float64(0.3)
    wanted = jnp.arange(5) % 2 == 0

    def total(x, shift):
        def one(wanted, x):
            tiled = in_batches(lambda x, y: jnp.cos(x) * y, 2, x, shift, flat=flat)
            plain = lambda x, y: x**3 * y  # noqa: E731
            return masked_cond(wanted, plain, tiled, x, shift, at_once=2)

        return jnp.sum(jax.vmap(one)(wanted, x) ** 2)

    check_grads(jax.jit(total), (x, shift), order=2, modes=("fwd", "rev"), rtol=1e-6)


def test_a_row_that_never_ends_does_not_hold_up_others():
    """A NaN that comes along is computed with the others and changes none of them."""
    x = jnp.array([1.0, jnp.nan, 2.0])
    where = jax.vmap(lambda x: masked_cond(x == x, lambda x, _: x + 1, x, x, None, at_once=2))
    np.testing.assert_array_equal(where(x), [2.0, np.nan, 3.0])


@pytest.mark.full
@pytest.mark.parametrize("size", [1, 3, 8])
def test_what_may_not_be_wanted_is_computed_in_the_loop_only(size):
    """XLA moves out of a loop what is the same in every turn, and computes it in any case."""

    def run(wanted, x, table):
        return masked_cond(
            wanted, lambda x, table: jnp.cos(table * x).sum(), x, x, table, at_once=8
        )

    args = jnp.zeros(size, bool), jnp.ones(size), jnp.ones(50)
    program = jax.jit(jax.vmap(run, (0, 0, None))).lower(*args).compile().as_text()
    parts = re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", program)
    named = {re.match(r"(?:ENTRY )?%([\w.\-]+) ", part)[1]: part for part in parts[1:]}
    waiting = [name for name, part in named.items() if part.startswith("ENTRY")]
    always = set()
    while waiting:
        name = waiting.pop()
        always.add(name)
        waiting += re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", named[name])
    with_cosine = {name for name, part in named.items() if " cosine(" in part}
    assert with_cosine
    assert not with_cosine & always
