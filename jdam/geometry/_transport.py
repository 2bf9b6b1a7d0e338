"""Exact transport between few weighted points, a linear program, by successive shortest paths."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, PyTree

from jdam._core.derivatives import full_precision
from jdam._core.linalg import pseudo_solve
from jdam._core.loops import while_loop

#: The largest number of augmentations, per point: 2 are typical.
ROUNDS = 32


class Plan(NamedTuple):
    """An optimal plan P of min Σ Pₖₗcₖₗ over P ≥ 0 with row sums a and column sums b.

    The potentials satisfy fₖ + gₗ ≤ cₖₗ, with equality where P > 0. `gap` bounds the suboptimality,
    Σ Pc − Σ fa − Σ gb."""

    mass: Float[Array, "K L"]
    cost: Float[Array, ""]
    rows: Float[Array, " K"]
    columns: Float[Array, " L"]
    gap: Float[Array, ""]


@jax.custom_jvp
def transport(cost: Float[Array, "K L"], a: Float[Array, " K"], b: Float[Array, " L"]) -> Plan:
    """Return the exact plan of least cost between weights a and b of the same sum.

    Mass is sent from rows with supply to columns with demand along a path of least reduced cost,
    which may revoke mass sent before, until no supply or demand is left. Rows and columns of weight
    0 stay empty."""
    rows = cost.min(1)
    columns = (cost - rows[:, None]).min(0)
    start = _Flow(jnp.zeros_like(cost), a, b, rows, columns, jnp.array(0, jnp.int32))
    max_rounds = ROUNDS * sum(cost.shape)

    def cond_fun(flow: _Flow) -> Bool[Array, ""]:
        return (flow.supply > 0).any() & (flow.demand > 0).any() & (flow.rounds < max_rounds)

    flow = while_loop(cond_fun, partial(_augment, cost), start, cost)
    value = jnp.vdot(flow.mass, cost)
    dual = jnp.vdot(flow.rows, a) + jnp.vdot(flow.columns, b)
    # The gap counts unsent mass at the largest cost.
    unsent = jnp.minimum(flow.supply.sum(), flow.demand.sum()) * cost.max()
    return Plan(flow.mass, value, flow.rows, flow.columns, jnp.abs(value - dual) + unsent)


class _Flow(NamedTuple):
    """The mass sent so far, remaining supply and demand, and potentials with reduced costs ≥ 0, and
    0 where mass was sent."""

    mass: Float[Array, "K L"]
    supply: Float[Array, " K"]
    demand: Float[Array, " L"]
    rows: Float[Array, " K"]
    columns: Float[Array, " L"]
    rounds: Int[Array, ""]


class _Search(NamedTuple):
    """Shortest distances from the rows with supply, by Dijkstra's algorithm; distances of visited
    rows and columns are final.
    """

    rows: Float[Array, " K"]
    columns: Float[Array, " L"]
    before_row: Int[Array, " K"]  # predecessor column of a row, −1 for a start
    before_column: Int[Array, " L"]  # predecessor row of a column
    visited_rows: Bool[Array, " K"]
    visited_columns: Bool[Array, " L"]
    last: Int[Array, ""]  # the last visited column


def _augment(cost: Float[Array, "K L"], flow: _Flow) -> _Flow:
    """Send as much mass as possible along one shortest path."""
    reduced = jnp.maximum(cost - flow.rows[:, None] - flow.columns[None], 0)
    has_demand = flow.demand > 0
    search = while_loop(
        # In a batch, finished problems are still iterated; they have no demand left.
        lambda search: ~has_demand[search.last] & ~search.visited_columns.all(),
        partial(_extend_search, reduced, flow.mass > 0, has_demand),
        _start_search(reduced, flow.supply > 0, has_demand),
        (reduced, flow),
    )
    end = search.last
    length = search.columns[end]
    path = _path(search)
    revocable = jnp.where(path < 0, flow.mass, jnp.inf).min()
    source = (path.sum(1) > 0) & (search.before_row < 0)
    supply = jnp.where(source, flow.supply, jnp.inf).min()
    sent = jnp.minimum(jnp.minimum(supply, flow.demand[end]), revocable)
    at_end = jnp.arange(flow.demand.size, dtype=jnp.int32) == end
    return _Flow(
        mass=flow.mass + sent * path,
        supply=flow.supply - jnp.where(source, sent, 0),
        demand=flow.demand - jnp.where(at_end, sent, 0),
        rows=flow.rows + jnp.where(search.visited_rows, length - search.rows, 0),
        columns=flow.columns - jnp.where(search.visited_columns, length - search.columns, 0),
        rounds=flow.rounds + 1,
    )


def _start_search(reduced: Array, starts: Array, has_demand: Array) -> _Search:
    """Initialise the search from the rows with supply, and visit the nearest column."""
    from_starts = jnp.where(starts[:, None], reduced, jnp.inf)
    unvisited = jnp.zeros(has_demand.shape, bool)
    search = _Search(
        rows=jnp.where(starts, 0, jnp.inf).astype(reduced.dtype),
        columns=from_starts.min(0),
        before_row=jnp.full(starts.shape, -1, jnp.int32),
        before_column=from_starts.argmin(0).astype(jnp.int32),
        visited_rows=starts,
        visited_columns=unvisited,
        last=jnp.array(0, jnp.int32),
    )
    return _visit_nearest(search, has_demand)


def _visit_nearest(search: _Search, has_demand: Array) -> _Search:
    """Mark the nearest unvisited column as visited, among equals one with demand."""
    distance = jnp.where(search.visited_columns, jnp.inf, search.columns)
    nearest = (distance == distance.min()) & ~search.visited_columns
    nearest = jnp.where((nearest & has_demand).any(), nearest & has_demand, nearest)
    last = nearest.argmax().astype(jnp.int32)
    at_last = jnp.arange(has_demand.size, dtype=jnp.int32) == last
    return search._replace(visited_columns=search.visited_columns | at_last, last=last)


def _extend_search(reduced: Array, used: Array, has_demand: Array, search: _Search) -> _Search:
    """Reach the rows that sent mass to the last column, update the distances through them, and
    visit the nearest column."""
    length = search.columns[search.last]
    new_rows = used[:, search.last] & ~search.visited_rows & (length < jnp.inf)
    through = jnp.where(new_rows[:, None], reduced, jnp.inf)
    distance = length + through.min(0)
    nearer = (distance < search.columns) & ~search.visited_columns
    further = search._replace(
        rows=jnp.where(new_rows, length, search.rows),
        columns=jnp.where(nearer, distance, search.columns),
        before_row=jnp.where(new_rows, search.last, search.before_row),
        before_column=jnp.where(nearer, through.argmin(0).astype(jnp.int32), search.before_column),
        visited_rows=search.visited_rows | new_rows,
    )
    return _visit_nearest(further, has_demand)


def _path(search: _Search) -> Float[Array, "K L"]:
    """Return the path to the last column: 1 where mass is sent, −1 where it is revoked."""
    size = search.rows.size, search.columns.size

    def body_fun(state: tuple[Array, Array]) -> tuple[Array, Array]:
        path, column = state
        row = search.before_column[column]
        before = search.before_row[row]
        path = path.at[row, column].set(1)
        revoked = path.at[row, jnp.maximum(before, 0)].set(-1)
        return jnp.where(before < 0, path, revoked), before

    start = jnp.zeros(size, search.rows.dtype), search.last
    return while_loop(lambda state: state[1] >= 0, body_fun, start, search)[0]


@transport.defjvp
@full_precision
def _transport_jvp(primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]) -> tuple[Plan, Plan]:
    # Plans are vertices, locally constant in costs. In weights they change along the edges that
    # carry mass: dP = P ∘ (α ⊕ β) with row and column sums da and db, which is unique on a tree.
    # Likewise df ⊕ dg = dc on these edges. By the envelope theorem, dcost needs neither.
    plan = transport(*primals)
    mass, (dcost, da, db) = plan.mass, tangents
    degrees = jnp.concatenate([mass.sum(1), mass.sum(0)])
    on = degrees > 0
    root = jnp.where(on, 1 / jnp.sqrt(jnp.where(on, degrees, 1)), 0)
    size = len(da)
    off = root[:size, None] * mass * root[None, size:]
    first, second = (jnp.diag(marks.astype(mass.dtype)) for marks in (on[:size], on[size:]))
    matrix = jnp.block([[first, off], [off.T, second]])

    # The largest eigenvalue is 2, wherever there is mass.
    rtol = 4 * len(matrix) * float(jnp.finfo(matrix.dtype).eps)

    def solve(*right: Array) -> tuple[Array, Array]:
        solution = root * pseudo_solve(matrix, root * jnp.concatenate(right), rtol)
        return solution[:size], solution[size:]

    alpha, beta = solve(da, db)
    dweighted = mass * dcost
    drows, dcolumns = solve(dweighted.sum(1), dweighted.sum(0))
    change = Plan(
        mass=mass * (alpha[:, None] + beta[None]),
        cost=dweighted.sum() + jnp.vdot(plan.rows, da) + jnp.vdot(plan.columns, db),
        rows=drows,
        columns=dcolumns,
        gap=jnp.zeros_like(plan.gap),
    )
    return plan, change
