"""Loops in which every query of a vmapped batch stops for itself."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool


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

    return jax.lax.while_loop(lambda carry: carry[0], turn, (wanted, default, operand))[1]


@compute_if.defjvp
def _compute_if_jvp(function: Callable, primals: tuple, tangents: tuple) -> Any:
    # A loop of unknown length has no reverse mode; what it computes has.
    def select(wanted: Array, default: Any, operand: Any, args: Any) -> Any:
        computed = function(operand, args)
        return jax.tree.map(lambda x, y: jnp.where(wanted, x, y), computed, default)

    return jax.jvp(select, primals, tangents)


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
    def run_batch(size: int, batched: Any, pending: Array, state: Any, args: Any) -> Any:
        def along_batch(leaf: Array, is_batched: bool) -> Array:
            return leaf if is_batched else jnp.broadcast_to(leaf[None], (size, *leaf.shape))

        if size == 0:
            return state, batched[1]
        pending = along_batch(pending, batched[0])
        state = jax.tree.map(along_batch, state, batched[1])
        leaves, structure = jax.tree.flatten(args)
        axes = [0 if is_batched else None for is_batched in jax.tree.leaves(batched[2])]
        width = min(at_once, size)
        order = jnp.argsort(~pending).astype(jnp.int32)  # the pending ones first
        order = jnp.pad(order, (0, -size % width))
        count = pending.sum(dtype=jnp.int32)

        def advance_leaves(state: Any, *leaves: Array) -> Any:
            return advance(state, jax.tree.unflatten(structure, leaves))

        def turn(carry: tuple[Array, Any]) -> tuple[Array, Any]:
            done, state = carry
            rows = jax.lax.dynamic_slice(order, (done,), (width,))
            new = jax.vmap(advance_leaves, (0, *axes))(
                jax.tree.map(lambda leaf: leaf[rows], state),
                *(
                    leaf if axis is None else leaf[rows]
                    for leaf, axis in zip(leaves, axes, strict=True)
                ),
            )
            rows = jnp.where(jnp.arange(width, dtype=jnp.int32) + done < count, rows, size)
            state = jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), state, new)
            return done + width, state

        start = (jnp.array(0, jnp.int32), state)
        state = jax.lax.while_loop(lambda carry: carry[0] < count, turn, start)[1]
        return state, jax.tree.map(lambda _: True, state)

    return run(pending, state, args)


@advance_where.defjvp
def _advance_where_jvp(advance: Callable, at_once: int, primals: tuple, tangents: tuple) -> Any:
    def compute(pending: Array, state: Any, args: Any) -> Any:
        return compute_if(pending, jax.checkpoint(advance), state, state, args)

    return jax.jvp(compute, primals, tangents)


def in_chunks(function: Callable[[Any], Any], at_once: int, args: Any) -> Any:
    """`function(args)`; under `jax.vmap`, however nested, the whole batch is flattened and
    mapped `at_once` elements at a time, so that each chunk's loops end when its own elements
    are done. `function` must not close over traced values."""

    def lead(size: int, batched: Any, args: Any) -> Any:
        def along_batch(leaf: Array, is_batched: bool) -> Array:
            return leaf if is_batched else jnp.broadcast_to(leaf[None], (size, *leaf.shape))

        return jax.tree.map(along_batch, args, batched)

    @jax.custom_batching.custom_vmap
    def one(args: Any) -> Any:
        return function(args)

    @jax.custom_batching.custom_vmap
    def many(args: Any) -> Any:
        size = jax.tree.leaves(args)[0].shape[0]
        if size <= at_once:
            return jax.vmap(function)(args)
        count = -(-size // at_once)
        width = -(-size // count)
        missing = count * width - size

        def cut(leaf: Array) -> Array:
            leaf = jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1), mode="edge")
            return leaf.reshape(count, width, *leaf.shape[1:])

        cuts = jax.tree.map(cut, args)
        found = jax.lax.map(jax.vmap(function), cuts)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:size], found)

    @one.def_vmap
    def over_one(size: int, batched: Any, args: Any) -> Any:
        found = many(lead(size, batched[0], args))
        return found, jax.tree.map(lambda _: True, found)

    @many.def_vmap
    def over_many(size: int, batched: Any, args: Any) -> Any:
        args = lead(size, batched[0], args)
        inner = jax.tree.leaves(args)[0].shape[1]
        flat = jax.tree.map(lambda leaf: leaf.reshape(size * inner, *leaf.shape[2:]), args)
        found = jax.tree.map(lambda leaf: leaf.reshape(size, inner, *leaf.shape[1:]), many(flat))
        return found, jax.tree.map(lambda _: True, found)

    return one(args)
