"""Exact transport between few weighted points: a linear program, solved by shortest paths."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdam._core.derivatives import full_precision
from jdam._core.lapack import eigh
from jdam._core.loops import while_loop

#: Augmentations, a multiple of the number of points: twice is ordinary.
ROUNDS = 32


class Plan(NamedTuple):
    """An optimal plan P of min Σ Pₖₗcₖₗ over P ≥ 0 with row sums a and column sums b; potentials
    fₖ + gₗ ≤ cₖₗ, equal where P > 0; and how far from optimal it may be, Σ Pc − Σ fa − Σ gb."""

    mass: Float[Array, "K L"]
    cost: Float[Array, ""]
    rows: Float[Array, " K"]
    columns: Float[Array, " L"]
    gap: Float[Array, ""]


@jax.custom_jvp
def transport(cost: Float[Array, "K L"], a: Float[Array, " K"], b: Float[Array, " L"]) -> Plan:
    """The exact plan of least cost between weights a and b of the same sum.

    By successive shortest paths: mass is sent from rows that have some to columns that want some
    along a path of least reduced cost, which may take back what was sent before, until none is
    left. Rows and columns of weight 0 get none.
    """
    rows = cost.min(1)
    columns = (cost - rows[:, None]).min(0)
    start = _Flow(jnp.zeros_like(cost), a, b, rows, columns, jnp.array(0, jnp.int32))
    most = ROUNDS * sum(cost.shape)

    def unfinished(flow: _Flow) -> Bool[Array, ""]:
        return (flow.supply > 0).any() & (flow.demand > 0).any() & (flow.rounds < most)

    flow = while_loop(unfinished, partial(_augment, cost), start, cost)
    value = jnp.vdot(flow.mass, cost)
    dual = jnp.vdot(flow.rows, a) + jnp.vdot(flow.columns, b)
    # What could not be sent, but for rounding, costs the most it can.
    left = jnp.minimum(flow.supply.sum(), flow.demand.sum()) * cost.max()
    return Plan(flow.mass, value, flow.rows, flow.columns, jnp.abs(value - dual) + left)


class _Flow(NamedTuple):
    """What has been sent, what is left, and potentials for which all reduced costs are ≥ 0, and 0
    where mass was sent."""

    mass: Float[Array, "K L"]
    supply: Float[Array, " K"]
    demand: Float[Array, " L"]
    rows: Float[Array, " K"]
    columns: Float[Array, " L"]
    rounds: Int[Array, ""]


class _Search(NamedTuple):
    """Shortest distances from the rows that have supply, by Dijkstra's algorithm: those of seen
    rows and columns are final."""

    rows: Float[Array, " K"]
    columns: Float[Array, " L"]
    before_row: Int[Array, " K"]  # the column that a row was reached from, −1 for a start
    before_column: Int[Array, " L"]  # the row likewise
    seen_rows: Bool[Array, " K"]
    seen_columns: Bool[Array, " L"]
    last: Int[Array, ""]  # the column seen last


def _augment(cost: Float[Array, "K L"], flow: _Flow) -> _Flow:
    """Send as much as fits along a shortest path."""
    reduced = jnp.maximum(cost - flow.rows[:, None] - flow.columns[None], 0)
    wanted = flow.demand > 0
    search = while_loop(
        # In a batch those that have ended go on, where nothing is wanted any more.
        lambda search: ~wanted[search.last] & ~search.seen_columns.all(),
        partial(_look_further, reduced, flow.mass > 0, wanted),
        _first_look(reduced, flow.supply > 0, wanted),
        (reduced, flow),
    )
    end = search.last
    length = search.columns[end]
    path = _path(search)
    back = jnp.where(path < 0, flow.mass, jnp.inf).min()
    source = (path.sum(1) > 0) & (search.before_row < 0)
    supply = jnp.where(source, flow.supply, jnp.inf).min()
    sent = jnp.minimum(jnp.minimum(supply, flow.demand[end]), back)
    at_end = jnp.arange(flow.demand.size, dtype=jnp.int32) == end
    return _Flow(
        mass=flow.mass + sent * path,
        supply=flow.supply - jnp.where(source, sent, 0),
        demand=flow.demand - jnp.where(at_end, sent, 0),
        rows=flow.rows + jnp.where(search.seen_rows, length - search.rows, 0),
        columns=flow.columns - jnp.where(search.seen_columns, length - search.columns, 0),
        rounds=flow.rounds + 1,
    )


def _first_look(reduced: Array, starts: Array, wanted: Array) -> _Search:
    from_starts = jnp.where(starts[:, None], reduced, jnp.inf)
    none = jnp.zeros(wanted.shape, bool)
    search = _Search(
        rows=jnp.where(starts, 0, jnp.inf).astype(reduced.dtype),
        columns=from_starts.min(0),
        before_row=jnp.full(starts.shape, -1, jnp.int32),
        before_column=from_starts.argmin(0).astype(jnp.int32),
        seen_rows=starts,
        seen_columns=none,
        last=jnp.array(0, jnp.int32),
    )
    return _see_nearest(search, wanted)


def _see_nearest(search: _Search, wanted: Array) -> _Search:
    """The nearest column that is not seen is; of several one that wants mass."""
    distance = jnp.where(search.seen_columns, jnp.inf, search.columns)
    nearest = (distance == distance.min()) & ~search.seen_columns
    nearest = jnp.where((nearest & wanted).any(), nearest & wanted, nearest)
    last = nearest.argmax().astype(jnp.int32)
    at_last = jnp.arange(wanted.size, dtype=jnp.int32) == last
    return search._replace(seen_columns=search.seen_columns | at_last, last=last)


def _look_further(reduced: Array, used: Array, wanted: Array, search: _Search) -> _Search:
    """Back along what was sent to the last column, and on from there."""
    length = search.columns[search.last]
    new = used[:, search.last] & ~search.seen_rows & (length < jnp.inf)
    through = jnp.where(new[:, None], reduced, jnp.inf)
    distance = length + through.min(0)
    nearer = (distance < search.columns) & ~search.seen_columns
    further = search._replace(
        rows=jnp.where(new, length, search.rows),
        columns=jnp.where(nearer, distance, search.columns),
        before_row=jnp.where(new, search.last, search.before_row),
        before_column=jnp.where(nearer, through.argmin(0).astype(jnp.int32), search.before_column),
        seen_rows=search.seen_rows | new,
    )
    return _see_nearest(further, wanted)


def _path(search: _Search) -> Float[Array, "K L"]:
    """The path to the last column: 1 where mass is sent, −1 where it is taken back."""
    size = search.rows.size, search.columns.size

    def back(state: tuple[Array, Array]) -> tuple[Array, Array]:
        path, column = state
        row = search.before_column[column]
        before = search.before_row[row]
        path = path.at[row, column].set(1)
        taken = path.at[row, jnp.maximum(before, 0)].set(-1)
        return jnp.where(before < 0, path, taken), before

    start = jnp.zeros(size, search.rows.dtype), search.last
    return while_loop(lambda state: state[1] >= 0, back, start, search)[0]


@transport.defjvp
@full_precision
def _transport_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Plan, Plan]:
    # Plans are vertices, which do not move with costs. With weights they do, along the edges that
    # carry mass: dP = P ∘ (α ⊕ β) with the sums da and db, which on a tree is the only solution,
    # as are df ⊕ dg = dc there. By the envelope theorem neither matters to the cost.
    plan = transport(*primals)
    mass, (dcost, da, db) = plan.mass, tangents
    degrees = jnp.concatenate([mass.sum(1), mass.sum(0)])
    on = degrees > 0
    root = jnp.where(on, 1 / jnp.sqrt(jnp.where(on, degrees, 1)), 0)
    size = len(da)
    off = root[:size, None] * mass * root[None, size:]
    first, second = (jnp.diag(marks.astype(mass.dtype)) for marks in (on[:size], on[size:]))
    matrix = jnp.block([[first, off], [off.T, second]])

    def solve(*right: Array) -> tuple[Array, Array]:
        found = root * _pseudo_solve(matrix, root * jnp.concatenate(right))
        return found[:size], found[size:]

    alpha, beta = solve(da, db)
    moved = mass * dcost
    drows, dcolumns = solve(moved.sum(1), moved.sum(0))
    change = Plan(
        mass=mass * (alpha[:, None] + beta[None]),
        cost=moved.sum() + jnp.vdot(plan.rows, da) + jnp.vdot(plan.columns, db),
        rows=drows,
        columns=dcolumns,
        gap=jnp.zeros_like(plan.gap),
    )
    return plan, change


def _pseudo_solve(matrix: Float[Array, "n n"], right: Float[Array, " n"]) -> Float[Array, " n"]:
    """A⁺ b of a symmetric A ⪰ 0, differentiable as the solution of a linear system."""
    values, basis = eigh(jax.lax.stop_gradient(matrix))
    kept = values > matrix.shape[0] * float(jnp.finfo(matrix.dtype).eps) * 8
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    result: Array = jax.lax.custom_linear_solve(
        lambda x: matrix @ x,
        basis @ (jnp.where(kept, 1, 0) * (basis.T @ right)),
        lambda _, b: basis @ (inverse * (basis.T @ b)),
        symmetric=True,
    )
    return result
