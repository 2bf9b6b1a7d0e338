"""Control flow whose time under `jax.vmap` follows the work, not the slowest element.

`map_in_batches` maps a function over explicit rows. `in_batches`, `masked_cond` and
`batched_while_loop` are written for one element and have batching rules of their own for
`jax.vmap`. Functions passed to them must not close over traced values.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, export
from jaxtyping import Bool, PyTree

from jdam._core.derivatives import full_precision, jvp
from jdam._core.loops import cond, while_loop
from jdam._core.mesh import on_local_shards

T = TypeVar("T")


#: Chunk size for a batch of symbolic length (`jax.export`). It is small because a chunk is always
#: computed in full, even for a batch of one.
OF_A_SYMBOL = 16


def map_in_batches(function: Callable[[PyTree], T], at_once: int | None, rows: PyTree) -> T:
    """Map `function` over rows, in equal chunks of at most `at_once` rows (one chunk if None).

    The last chunk is padded with copies of the last row, because `lax.map` would compile the
    remainder as a second program."""
    size: Any = jax.tree.leaves(rows)[0].shape[0]
    if export.is_symbolic_dim(size):
        width = min(at_once or OF_A_SYMBOL, OF_A_SYMBOL)
        count = -(-size // width)
    elif at_once is None or size <= at_once:
        whole: T = jax.vmap(function)(rows)
        return whole
    else:
        count, width = equal_parts(size, at_once)

    def cut(leaf: Array) -> Array:
        missing = count * width - size
        leaf = jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1), mode="edge")
        return leaf.reshape(count, width, *leaf.shape[1:])

    chunks = jax.lax.map(jax.vmap(function), jax.tree.map(cut, rows))
    joined: T = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:size], chunks)
    return joined


def in_batches(
    function: Callable[..., T], at_once: int | None, *args: Any, flat: bool = False
) -> T:
    """Call `function(*args)`; under `jax.vmap`, compute `at_once` elements of the batch at a time.

    If `at_once` is None, all elements are computed at once. A batch that is sharded over the
    devices of a mesh is computed where its shards lie, and the results stay there.

    Of nested batches, only the inner one is split into tiles, and unbatched arguments are not
    copied. If `flat`, nested batches are merged into one, and unbatched arguments are copied for
    each element."""
    one = jax.custom_batching.custom_vmap(function)

    def over_rows(args: PyTree) -> PyTree:
        return map_in_batches(lambda row: function(*row), at_once, args)

    @one.def_vmap
    @full_precision
    def batch_rule(size: int, batched: PyTree, *args: Any) -> PyTree:
        if flat:
            results = _as_one_batch(over_rows, _broadcast_batch(size, tuple(batched), args))
        else:
            in_chunks = partial(_in_chunks, function, at_once, batched)
            results = on_local_shards(in_chunks, tuple(batched), args)
        return results, jax.tree.map(lambda _: True, results)

    result: T = _with_derivative_of(function, one)(*args)
    return result


def masked_cond(
    condition: Bool[Array, ""],
    function: Callable[[PyTree, PyTree], T],
    default: T,
    operand: PyTree,
    args: PyTree,
    *,
    at_once: int | None = None,
) -> T:
    """Return `function(operand, args)` if `condition` holds, else `default`.

    `lax.cond` under `jax.vmap` computes both branches for every element. Here, elements whose
    condition holds are gathered and computed `at_once` at a time. If `at_once` is None, all
    elements are computed if one condition holds, and so they are for derivatives."""

    def selected(condition: Array, default: T, operand: PyTree, args: PyTree) -> T:
        # What few elements at a time have memory for is not stored for reverse mode.
        of_one = function if at_once is None else jax.checkpoint(function)

        def compute(default: T) -> T:
            computed = of_one(operand, args)
            chosen: T = jax.tree.map(partial(jnp.where, condition), computed, default)
            return chosen

        values = condition, operand, args
        return cond(any_of_batch(condition), compute, lambda default: default, default, values)

    if at_once is None:
        return selected(condition, default, operand, args)

    def body_fun(state: tuple[Array, T, PyTree], args: PyTree) -> tuple[Array, T, PyTree]:
        condition, _, operand = state
        # XLA would hoist the call out of the loop if the operand were loop-invariant.
        consumed = jax.tree.map(jnp.zeros_like, operand)
        return jnp.zeros_like(condition), function(operand, args), consumed

    def computed(condition: Array, default: T, operand: PyTree, args: PyTree) -> T:
        state = condition, default, operand
        return batched_while_loop(lambda s, _: s[0], body_fun, state, args, at_once=at_once)[1]

    result: T = _with_derivative_of(selected, computed)(condition, default, operand, args)
    return result


def batched_while_loop(
    cond_fun: Callable[[T, PyTree], Array],
    body_fun: Callable[[T, PyTree], T],
    state: T,
    args: PyTree,
    *,
    at_once: int,
    flat: bool = False,
) -> T:
    """Return the last state of `while cond_fun(state, args): state = body_fun(state, args)`.

    Under `jax.vmap` the active elements form a work queue, of which `at_once` are advanced at a
    time, so that no element waits for the slowest. The loop has no derivative. `flat` as in
    `in_batches`."""

    def one(state: T, args: PyTree) -> T:
        return while_loop(lambda s: cond_fun(s, args), lambda s: body_fun(s, args), state, args)

    def over_rows(states: T, rows: PyTree, join: Callable[[PyTree], PyTree]) -> T:
        row_cond, row_body = (lambda s, row, f=f: f(s, join(row)) for f in (cond_fun, body_fun))
        return _work_queue(row_cond, row_body, at_once, states, rows)

    batchable = jax.custom_batching.custom_vmap(one)

    @batchable.def_vmap
    @full_precision
    def batch_rule(size: int, batched: PyTree, *values: Any) -> PyTree:
        if export.is_symbolic_dim(size):
            states = _in_chunks(batchable, None, batched, *values)
        elif flat:
            merged = lambda rows: over_rows(rows[0], rows[1], lambda row: row)  # noqa: E731
            states = _as_one_batch(merged, _broadcast_batch(size, tuple(batched), values))
        else:
            states = _broadcast_batch(size, batched[0], values[0])
            states = over_rows(states, *_split(batched[1], values[1]))
        return states, jax.tree.map(lambda _: True, states)

    final: T = batchable(state, args)
    return final


@jax.custom_batching.custom_vmap
def any_of_batch(condition: Bool[Array, ""]) -> Bool[Array, ""]:
    """Return the condition; under `jax.vmap`, whether it holds for any element, without the batch
    axis, so that `lax.cond` computes one branch."""
    return condition


@any_of_batch.def_vmap
def _any_of_batch_rule(size: int, batched: PyTree, condition: Array) -> tuple[Array, bool]:
    return any_of_batch(condition.any(0)), False


def with_leading_axes(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Return `function`, whose arguments may have any leading axes, with a batching rule that calls
    it with one more leading axis."""
    one = jax.custom_batching.custom_vmap(function)

    @one.def_vmap
    def batch_rule(size: int, batched: PyTree, *args: Array) -> PyTree:
        results = one(*_broadcast_batch(size, tuple(batched), args))
        return results, jax.tree.map(lambda _: True, results)

    batchable: Callable[..., PyTree] = one
    return batchable


def _with_derivative_of(plain: Callable[..., T], function: Callable[..., T]) -> Callable[..., T]:
    """Return `function` with the derivative of `plain`, which computes the same values without
    batching rules."""
    differentiable: Callable[..., T] = jax.custom_jvp(function)
    differentiable.defjvp(full_precision(partial(jvp, plain)), symbolic_zeros=True)  # type: ignore
    return differentiable


def _in_chunks(function: Callable[..., T], at_once: int | None, batched: PyTree, *values: Any) -> T:
    """Call `function(*values)` for each element of a batch, `at_once` elements at a time."""
    rows, join = _split(tuple(batched), values)
    return map_in_batches(lambda row: function(*join(row)), at_once, rows)


def _as_one_batch(function: Callable[[PyTree], PyTree], rows: PyTree) -> PyTree:
    """Call `function(rows)`, merging a further batch axis under `jax.vmap` with that of the
    rows."""

    @jax.custom_batching.custom_vmap
    def many(rows: PyTree) -> PyTree:
        return function(rows)

    @many.def_vmap
    @full_precision
    def batch_rule(size: int, batched: PyTree, rows: PyTree) -> PyTree:
        rows = _broadcast_batch(size, batched[0], rows)
        inner = jax.tree.leaves(rows)[0].shape[1]
        flat = jax.tree.map(lambda leaf: leaf.reshape(size * inner, *leaf.shape[2:]), rows)
        results = jax.tree.map(lambda leaf: leaf.reshape(size, inner, *leaf.shape[1:]), many(flat))
        return results, jax.tree.map(lambda _: True, results)

    return many(rows)


def _work_queue(
    cond_fun: Callable[[T, PyTree], Array],
    body_fun: Callable[[T, PyTree], T],
    at_once: int,
    states: T,
    rows: PyTree,
) -> T:
    """Advance `at_once` of the active states at a time, until none is active.

    Those that had the fewest turns come first: what takes long is then done for states of the same
    age together."""
    size = batch_size(states)
    if size == 0:
        return states

    def priority(states: T, rows: PyTree, turns: Array) -> Array:
        return jnp.where(jax.vmap(cond_fun)(states, rows), -turns, -jnp.inf)

    def advance(carry: tuple[T, Array]) -> tuple[T, Array]:
        first, index = jax.lax.top_k(carry[1], min(at_once, size))
        some, some_rows = jax.tree.map(lambda leaf: leaf[index], (carry[0], rows))
        advanced = jax.vmap(body_fun)(some, some_rows)
        after = advanced, priority(advanced, some_rows, 1 - first)
        index = jnp.where(first == -jnp.inf, size, index)  # out of range
        written: tuple[T, Array] = jax.tree.map(
            lambda x, y: x.at[index].set(y, mode="drop"), carry, after
        )
        return written

    start = states, priority(states, rows, jnp.zeros(size, jnp.float32))
    return while_loop(lambda carry: (carry[1] > -jnp.inf).any(), advance, start, rows)[0]


def _split(batched: PyTree, args: PyTree) -> tuple[list[Array], Callable[[list[Array]], PyTree]]:
    """Return the batched leaves of `args`, and a function that joins one row of them with the
    unbatched leaves."""
    leaves, structure = jax.tree.flatten(args)
    marks = jax.tree.leaves(batched)
    rows = [leaf for leaf, mark in zip(leaves, marks, strict=True) if mark]

    def join(row: list[Array]) -> PyTree:
        own = iter(row)
        return jax.tree.unflatten(
            structure,
            [next(own) if mark else leaf for leaf, mark in zip(leaves, marks, strict=True)],
        )

    return rows, join


def _broadcast_batch(size: int, batched: PyTree, tree: PyTree) -> PyTree:
    """Broadcast the leaves that are not batched along the batch axis."""

    def lead(leaf: Array, is_batched: bool) -> Array:
        return leaf if is_batched else jnp.broadcast_to(leaf, (size, *jnp.shape(leaf)))

    return jax.tree.map(lead, tree, batched)


def by_platform(cpu: T, accelerator: T) -> T:
    """Return what suits the default backend. Numbers of elements to compute at once fit the cache
    on a CPU, and outlast the launch of kernels on an accelerator."""
    return cpu if jax.default_backend() == "cpu" else accelerator


def power_of_two(size: int) -> int:
    """Return the least power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def equal_parts(size: int, at_most: int) -> tuple[int, int]:
    """Return the number and the size of equal parts of at most `at_most` rows that cover `size`
    rows.

    A size above `at_most`/2 that divides `size` is preferred, because padding copies all rows."""
    width = next((w for w in range(at_most, at_most // 2, -1) if size % w == 0), at_most)
    count = -(-size // width)
    return count, -(-size // max(count, 1))


def batch_size(tree: PyTree) -> int:
    """Return the common length of the leading axis of all leaves.

    **Raises:** `ValueError` for a symbolic length (`jax.export`)."""
    size: Any = jax.tree.leaves(tree)[0].shape[0]
    if export.is_symbolic_dim(size):
        raise ValueError(
            f"this batch axis must have a known length; got the symbol {size}: export it with a "
            "number. A batch of queries may have a symbol under jax.vmap"
        )
    return int(size)
