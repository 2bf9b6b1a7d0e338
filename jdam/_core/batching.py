"""Batches in which time follows the work that is left, and memory a few elements at a time.

Four primitives: `map_in_batches` maps over rows that are there; `in_batches`, `masked_cond` and
`batched_while_loop` are functions of one element, with a rule of their own for `jax.vmap`. The
functions given to them must close over nothing traced.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, export
from jaxtyping import Bool

from jdam._core.derivatives import full_precision, jvp
from jdam._core.loops import while_loop
from jdam._core.mesh import on_local_shards

T = TypeVar("T")


#: Rows at a time of a batch whose length is a symbol, as `jax.export` may have it: few, since the
#: last ones are filled up, and of a batch of one as many are computed.
OF_A_SYMBOL = 16


class _Settings(NamedTuple):
    function: Callable[..., Any]
    at_once: int | None
    flat: bool


def map_in_batches(function: Callable[[Any], T], at_once: int | None, rows: Any) -> T:
    """`function` of each row, in equal chunks of at most `at_once`, all of them if None, the last
    one filled up with copies of the last row: `lax.map` would compile what remains once more."""
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

    found = jax.lax.map(jax.vmap(function), jax.tree.map(cut, rows))
    joined: T = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:size], found)
    return joined


def in_batches(
    function: Callable[..., T], at_once: int | None, *args: Any, flat: bool = False
) -> T:
    """`function(*args)`; under `jax.vmap`, `at_once` elements of the batch at a time, all of them
    if None. A batch that is spread over the devices of a mesh is computed where it is, and so are
    its results.

    Of nested batches the inner is tiled, with what its elements share shared; if `flat`, they are
    one batch, of which nothing is shared."""
    found: T = _in_tiles(_Settings(function, at_once, flat), *args)
    return found


def masked_cond(
    wanted: Bool[Array, ""],
    function: Callable[[Any, Any], T],
    default: T,
    operand: Any,
    args: Any,
    *,
    at_once: int | None = None,
    flat: bool = False,
) -> T:
    """`function(operand, args)` if wanted, else `default`; computed only if needed.

    Under `jax.vmap` a `lax.cond` computes both sides for every element, and a batch takes as long,
    in every element, as its slowest. Here the wanted elements are gathered and computed `at_once`
    at a time; if None, all are computed as soon as one is wanted. `flat` as in `in_batches`.
    """
    settings = _Settings(function, at_once, flat)
    found: T = _compute_where(settings, wanted, default, operand, args)
    return found


def batched_while_loop(
    unfinished: Callable[[T, Any], Array],
    turn: Callable[[T, Any], T],
    state: T,
    args: Any,
    *,
    at_once: int,
    flat: bool = False,
) -> T:
    """`turn(state, args)` as long as the state is `unfinished`. It has no derivative.

    Under `jax.vmap` the elements that are not finished take turns, `at_once` of them at a time, so
    that none of them waits for the slowest. `flat` as in `in_batches`.
    """

    @jax.custom_batching.custom_vmap
    def one(state: T, args: Any) -> Any:
        return while_loop(lambda s: unfinished(s, args), lambda s: turn(s, args), state, args)

    def many(given: Any) -> Any:
        state, rows = given
        return _queued(unfinished, turn, at_once, state, rows)

    @one.def_vmap
    @full_precision
    def over_one(size: int, batched: Any, *given: Any) -> Any:
        if export.is_symbolic_dim(size):
            found = _some_at_a_time(one, batched, given)
        elif flat:
            found = _flat(many, _lead(size, tuple(batched), given))
        else:
            rows, join = _split(batched[1], given[1])
            pending, advance = (lambda s, row, f=f: f(s, join(row)) for f in (unfinished, turn))
            state = _lead(size, batched[0], given[0])
            found = _queued(pending, advance, at_once, state, rows)
        return found, jax.tree.map(lambda _: True, found)

    advanced: T = one(state, args)
    return advanced


def _with_derivative_of(plain: Callable[..., Any]) -> Callable[..., Any]:
    """For a function of settings and arguments: its derivative is that of `plain` of the same,
    which computes the same without regard to batches."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = jax.custom_jvp(function, nondiff_argnums=(0,))

        @partial(wrapped.defjvp, symbolic_zeros=True)
        @full_precision
        def _(settings: _Settings, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
            return jvp(partial(plain, settings), primals, tangents)

        return wrapped

    return decorate


def _plainly(settings: _Settings, *args: Any) -> Any:
    return settings.function(*args)


@_with_derivative_of(_plainly)
def _in_tiles(settings: _Settings, *args: Any) -> Any:
    function, at_once = settings.function, settings.at_once

    @jax.custom_batching.custom_vmap
    def one(*args: Any) -> Any:
        return function(*args)

    def many(args: Any) -> Any:
        return map_in_batches(lambda row: function(*row), at_once, args)

    @one.def_vmap
    @full_precision
    def over_one(size: int, batched: Any, *args: Any) -> Any:
        if settings.flat:
            found = _flat(many, _lead(size, tuple(batched), args))
            return found, jax.tree.map(lambda _: True, found)

        def in_turns(*args: Any) -> Any:
            rows, join = _split(tuple(batched), args)
            return map_in_batches(lambda row: function(*join(row)), at_once, rows)

        found = on_local_shards(in_turns, tuple(batched), args)
        return found, jax.tree.map(lambda _: True, found)

    return one(*args)


def _selected(settings: _Settings, wanted: Array, default: T, operand: Any, args: Any) -> T:
    # A loop of unknown length has no reverse mode; what it computes has.
    function = settings.function
    if settings.at_once is not None:
        function = jax.checkpoint(function)
    computed = function(operand, args)
    selected: T = jax.tree.map(lambda x, y: jnp.where(wanted, x, y), computed, default)
    return selected


@_with_derivative_of(_selected)
def _compute_where(
    settings: _Settings, wanted: Array, default: Any, operand: Any, args: Any
) -> Any:
    function, at_once = settings.function, settings.at_once

    alone = partial(_once, function)
    if at_once is None:
        return alone(wanted, default, operand, args)
    one = jax.custom_batching.custom_vmap(alone)

    def many(rows: Any) -> Any:
        wanted, default, *others = rows
        return _gathered(lambda row: function(*row), at_once, wanted, others, default)

    @one.def_vmap
    @full_precision
    def over_one(size: int, batched: Any, *given: Any) -> Any:
        if export.is_symbolic_dim(size):
            found = _some_at_a_time(one, batched, given)
        elif settings.flat:
            found = _flat(many, _lead(size, tuple(batched), given))
        else:
            wanted, default, operand = _lead(size, tuple(batched[:3]), given[:3])
            rows, join = _split(batched[3], given[3])
            compute = lambda row: function(row[0], join(row[1]))  # noqa: E731
            found = _gathered(compute, at_once, wanted, (operand, rows), default)
        return found, jax.tree.map(lambda _: True, found)

    return one(wanted, default, operand, args)


def _some_at_a_time(one: Callable[..., Any], batched: Any, given: tuple[Any, ...]) -> Any:
    """`one` of each of a batch whose length is a symbol, in batches whose length is known."""
    rows, join = _split(tuple(batched), given)
    return map_in_batches(lambda row: one(*join(row)), None, rows)


def _once(
    function: Callable[[Any, Any], T], wanted: Array, default: T, operand: Any, args: Any
) -> T:
    """`function(operand, args)` if wanted, by a loop of one turn or none."""

    def turn(carry: tuple[Array, T, Any]) -> tuple[Array, T, Any]:
        # Were the operand to stay as it is, XLA would move the work out of the loop.
        consumed = jax.tree.map(jnp.zeros_like, carry[2])
        return jnp.zeros_like(wanted), function(carry[2], args), consumed

    found: T = while_loop(lambda carry: carry[0], turn, (wanted, default, operand), args)[1]
    return found


def _flat(function: Callable[[Any], Any], rows: Any) -> Any:
    """`function` of rows; of rows of rows, under `jax.vmap`, as of one batch."""

    @jax.custom_batching.custom_vmap
    def many(rows: Any) -> Any:
        return function(rows)

    @many.def_vmap
    @full_precision
    def over_many(size: int, batched: Any, rows: Any) -> Any:
        rows = _lead(size, batched[0], rows)
        inner = jax.tree.leaves(rows)[0].shape[1]
        flat = jax.tree.map(lambda leaf: leaf.reshape(size * inner, *leaf.shape[2:]), rows)
        found = jax.tree.map(lambda leaf: leaf.reshape(size, inner, *leaf.shape[1:]), many(flat))
        return found, jax.tree.map(lambda _: True, found)

    return many(rows)


def _gathered(
    function: Callable[[Any], T], at_once: int, wanted: Array, rows: Any, default: T
) -> T:
    """`function` of the rows that are wanted, gathered `at_once` at a time; `default` elsewhere."""
    size = wanted.shape[0]
    if size == 0:
        return default
    if size == 1:
        return _once(lambda rows, _: jax.vmap(function)(rows), wanted[0], default, rows, ())
    width = min(at_once, size)
    order = jnp.argsort(~wanted).astype(jnp.int32)  # the wanted ones first
    # One more than are taken: else all are at once, whatever the turn, and XLA would compute them
    # before the loop.
    order = jnp.pad(order, (0, -size % width + 1))
    count = wanted.sum(dtype=jnp.int32)

    def turn(carry: tuple[Array, T]) -> tuple[Array, T]:
        done, found = carry
        chosen = jax.lax.dynamic_slice(order, (done,), (width,))
        computed = jax.vmap(function)(jax.tree.map(lambda leaf: leaf[chosen], rows))
        chosen = jnp.where(jnp.arange(width, dtype=jnp.int32) + done < count, chosen, size)
        written = jax.tree.map(lambda x, y: x.at[chosen].set(y, mode="drop"), found, computed)
        return done + width, written

    start = (jnp.array(0, jnp.int32), default)
    return while_loop(lambda carry: carry[0] < count, turn, start, rows)[1]


def _queued(
    unfinished: Callable[[T, Any], Array],
    turn: Callable[[T, Any], T],
    at_once: int,
    state: T,
    rows: Any,
) -> T:
    """Rounds in which all states that are unfinished have a turn."""
    size = batch_size(state)
    if size == 0:
        return state

    def waiting(state: T) -> Bool[Array, " Q"]:
        return jax.vmap(unfinished)(state, rows)

    def take_turns(state: T) -> T:
        if size <= at_once:
            ahead = jax.vmap(turn)(state, rows)
            moved: T = jax.tree.map(partial(jax.vmap(jnp.where), waiting(state)), ahead, state)
            return moved
        return _gathered(lambda row: turn(*row), at_once, waiting(state), (state, rows), state)

    return while_loop(lambda state: waiting(state).any(), take_turns, state, rows)


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
        return leaf if is_batched else jnp.broadcast_to(leaf, (size, *jnp.shape(leaf)))

    return jax.tree.map(lead, tree, batched)


def by_platform(cpu: int, accelerator: int) -> int:
    """How much to compute at once: what stays in the cache of a CPU, or what lasts longer on an
    accelerator than the launch of its kernels."""
    return cpu if jax.default_backend() == "cpu" else accelerator


def equal_parts(size: int, at_most: int) -> tuple[int, int]:
    """Into how many parts of what size to cut so many rows; with no rest where that is possible,
    since filling up the last part takes a copy of all."""
    width = next((w for w in range(at_most, at_most // 2, -1) if size % w == 0), at_most)
    count = -(-size // width)
    return count, -(-size // max(count, 1))


def batch_size(tree: Any) -> int:
    """The length of the leading axis, which all leaves share.

    **Raises:** `ValueError` for a symbol, as `jax.export` may have it."""
    size: Any = jax.tree.leaves(tree)[0].shape[0]
    if export.is_symbolic_dim(size):
        raise ValueError(
            f"this batch axis must have a known length; got the symbol {size}: export it with a "
            "number. A batch of queries may have a symbol under jax.vmap"
        )
    return int(size)
