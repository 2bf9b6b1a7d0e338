"""Loops in which every query of a vmapped batch stops for itself."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool

from jdam._derivatives import full_precision, jvp
from jdam._layout import where_it_is
from jdam._loops import while_loop


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def compute_if(
    wanted: Bool[Array, ""], function: Callable[..., Any], default: Any, operand: Any, args: Any
) -> Any:
    """`function(operand, args)` if wanted, else `default`. Under `jax.vmap` a `lax.cond` would
    always compute both; here the function is computed only if some query wants it."""

    def turn(carry: tuple[Array, Any, Any]) -> tuple[Array, Any, Any]:
        # Were the operand to stay as it is, XLA would move the work out of the loop.
        consumed = jax.tree.map(jnp.zeros_like, carry[2])
        return jnp.zeros_like(wanted), function(carry[2], args), consumed

    return while_loop(lambda carry: carry[0], turn, (wanted, default, operand), args)[1]


@partial(compute_if.defjvp, symbolic_zeros=True)
@full_precision
def _compute_if_jvp(function: Callable, primals: tuple, tangents: tuple) -> Any:
    # A loop of unknown length has no reverse mode; what it computes has.
    def select(wanted: Array, default: Any, operand: Any, args: Any) -> Any:
        computed = function(operand, args)
        return jax.tree.map(lambda x, y: jnp.where(wanted, x, y), computed, default)

    return jvp(select, primals, tangents)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def advance_where(
    advance: Callable[[Any, Any], Any],
    at_once: int,
    pending: Bool[Array, ""],
    state: Any,
    args: Any,
) -> Any:
    """`advance(state, args)` where `pending`, else `state`: the work is done only if needed.

    Under `jax.vmap` a `lax.cond` computes both sides for every query, and a batch takes as
    long, in every query, as its slowest. Here the pending queries are gathered and advanced
    `at_once` at a time, so that time follows their number, and memory `at_once`. `advance`
    must not close over traced values.
    """

    @jax.custom_batching.custom_vmap
    def run(pending: Array, state: Any, args: Any) -> Any:
        return compute_if(pending, advance, state, state, args)

    @run.def_vmap
    @full_precision
    def run_batch(size: int, batched: Any, pending: Array, state: Any, args: Any) -> Any:
        pending = _lead(size, batched[0], pending)
        state = _lead(size, batched[1], state)
        rows, join = _split(batched[2], args)

        def advance_rows(rows: list[Array], state: Any) -> Any:
            return jax.vmap(lambda row, state: advance(state, join(row)))(rows, state)

        state = _map_where(advance_rows, at_once, pending, rows, state)
        return state, jax.tree.map(lambda _: True, state)

    return run(pending, state, args)


@partial(advance_where.defjvp, symbolic_zeros=True)
@full_precision
def _advance_where_jvp(advance: Callable, at_once: int, primals: tuple, tangents: tuple) -> Any:
    def compute(pending: Array, state: Any, args: Any) -> Any:
        return compute_if(pending, jax.checkpoint(advance), state, state, args)

    return jvp(compute, primals, tangents)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def in_tiles(function: Callable[..., Any], at_once: int | None, *args: Any) -> Any:
    """`function(*args)`; under `jax.vmap`, `at_once` elements of the batch at a time, all of them
    if None. A batch that is spread over the devices of a mesh is computed where it is, and so are
    its results. `function` must not close over traced values."""

    @jax.custom_batching.custom_vmap
    def run(*args: Any) -> Any:
        return function(*args)

    @run.def_vmap
    @full_precision
    def run_batch(size: int, batched: Any, *args: Any) -> Any:
        def in_turns(*args: Any) -> Any:
            rows, join = _split(tuple(batched), args)
            at_most = max(1, _batch_size(rows)) if at_once is None else at_once
            return map_in_chunks(lambda row: function(*join(row)), at_most, rows)

        found = where_it_is(in_turns, tuple(batched), args)
        return found, jax.tree.map(lambda _: True, found)

    return run(*args)


@partial(in_tiles.defjvp, symbolic_zeros=True)
@full_precision
def _in_tiles_jvp(function: Callable, at_once: int | None, primals: tuple, tangents: tuple) -> Any:
    return jvp(function, primals, tangents)


def in_chunks(
    function: Callable[[Any], Any],
    at_once: int,
    args: Any,
    *,
    unfinished: Callable[[Any], Array] = lambda _: jnp.array(False),
    finish: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """`found = function(args)`, and `finish(args, found)` instead if `unfinished(found)`.

    Under `jax.vmap`, however nested, the whole batch is flattened. `function` is mapped over it
    `at_once` elements at a time, so that each chunk's loops end when its own elements are done;
    then the unfinished elements are gathered, and `finish` is mapped over these likewise. The
    functions must not close over traced values.
    """

    @jax.custom_batching.custom_vmap
    def one(args: Any) -> Any:
        found = function(args)
        if finish is None:
            return found
        return jax.lax.cond(unfinished(found), finish, lambda _, found: found, args, found)

    @jax.custom_batching.custom_vmap
    def many(args: Any) -> Any:
        found = map_in_chunks(function, at_once, args)
        if finish is None:
            return found
        return _map_where(jax.vmap(finish), at_once, jax.vmap(unfinished)(found), args, found)

    @one.def_vmap
    @full_precision
    def over_one(size: int, batched: Any, args: Any) -> Any:
        found = many(_lead(size, batched[0], args))
        return found, jax.tree.map(lambda _: True, found)

    @many.def_vmap
    @full_precision
    def over_many(size: int, batched: Any, args: Any) -> Any:
        args = _lead(size, batched[0], args)
        inner = jax.tree.leaves(args)[0].shape[1]
        flat = jax.tree.map(lambda leaf: leaf.reshape(size * inner, *leaf.shape[2:]), args)
        found = jax.tree.map(lambda leaf: leaf.reshape(size, inner, *leaf.shape[1:]), many(flat))
        return found, jax.tree.map(lambda _: True, found)

    return one(args)


def _map_where(
    function: Callable[[Any, Any], Any], at_once: int, wanted: Array, args: Any, state: Any
) -> Any:
    """`function(args, state)` in the rows that are wanted, gathered `at_once` at a time."""
    size = wanted.shape[0]
    if size == 0:
        return state
    width = min(at_once, size)
    order = jnp.argsort(~wanted).astype(jnp.int32)  # the wanted ones first
    order = jnp.pad(order, (0, -size % width))
    count = wanted.sum(dtype=jnp.int32)

    def turn(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        done, state = carry
        rows = jax.lax.dynamic_slice(order, (done,), (width,))
        gathered = jax.tree.map(lambda leaf: leaf[rows], (args, state))
        new = function(*gathered)
        rows = jnp.where(jnp.arange(width, dtype=jnp.int32) + done < count, rows, size)
        state = jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), state, new)
        return done + width, state

    start = (jnp.array(0, jnp.int32), state)
    return while_loop(lambda carry: carry[0] < count, turn, start, args)[1]


def map_in_chunks(function: Callable[[Any], Any], at_once: int, args: Any) -> Any:
    """`function` of each row of args, in equal chunks of at most `at_once`, the last one filled
    up with copies of the last row: `lax.map` would compile what remains once more."""
    size = _batch_size(args)
    if size <= at_once:
        return jax.vmap(function)(args)
    count = -(-size // at_once)
    width = -(-size // max(count, 1))

    def cut(leaf: Array) -> Array:
        missing = count * width - size
        leaf = jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1), mode="edge")
        return leaf.reshape(count, width, *leaf.shape[1:])

    found = jax.lax.map(jax.vmap(function), jax.tree.map(cut, args))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:size], found)


def _split(batched: Any, args: Any) -> tuple[list[Array], Callable[[list[Array]], Any]]:
    """The leaves of args that are batched, and how to put one row of them back among those
    that all rows share."""
    leaves, structure = jax.tree.flatten(args)
    marks = jax.tree.leaves(batched)
    rows = [leaf for leaf, mark in zip(leaves, marks, strict=True) if mark]

    def join(row: list[Array]) -> Any:
        own = iter(row)
        return jax.tree.unflatten(
            structure,
            [next(own) if mark else leaf for leaf, mark in zip(leaves, marks, strict=True)],
        )

    return rows, join


def _lead(size: int, batched: Any, tree: Any) -> Any:
    """The tree with every leaf led by the batch axis."""

    def lead(leaf: Array, is_batched: bool) -> Array:
        return leaf if is_batched else jnp.broadcast_to(leaf[None], (size, *leaf.shape))

    return jax.tree.map(lead, tree, batched)


def _batch_size(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[0]
