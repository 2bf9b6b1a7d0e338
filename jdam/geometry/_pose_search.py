"""Search for poses: many starts, and one-sided plans of decreasing ε."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jdam._core.lapack import determinant, eigh
from jdam._core.linalg import safe_sqrt
from jdam._core.loops import while_loop
from jdam._entropic.problem import Marginals
from jdam.geometry._alignment import (
    Group,
    Problem,
    best_pose,
    displacement,
    one_sided_moments,
)
from jdam.geometry._poses import Pose, rotations, where_rows

#: The number of levels of ε for each start, from the size of a query to the ε of the geometry.
LEVELS = 6
#: The number of parallel lanes of the search; each refines the best pose of its starts.
LANES = 4
#: The largest number of refinements of a pose.
MAX_REFINEMENTS = 64
#: The default number of starts for each dimension, and for all higher ones.
STARTS, DEFAULT_STARTS = {1: 4, 2: 16, 3: 48}, 128


class SearchState(NamedTuple):
    """State of a search for poses of B patterns in W lanes."""

    iteration: Int[Array, ""]
    poses: Pose
    score: Float[Array, "B W"]  # costs of `poses`, or of `best` while searching
    change: Float[Array, "B W"]  # last displacement of atoms, in units of the tolerance
    best: Pose  # the best end of a start so far
    best_score: Float[Array, "B W"]


class Settings(NamedTuple):
    """Settings of the plans of a search: the final ε and ρ, the largest number of refinements, and
    the growth of the self cost as a function of the scale (B, W), see `best_pose`.
    """

    marginals: Marginals
    max_refinements: int
    growth: Callable[[Array], Array] | None = None


def search(
    group: Group, problem: Problem, previous: Pose, candidates: Pose, plans: Settings
) -> SearchState:
    """Search for poses from the `candidates` (B, rounds, W).

    Each lane takes its candidates one after another, with ε decreasing from the size of the query.
    Then all lanes refine their best poses until the best lane has converged. If all `previous`
    poses are known, only these are refined.
    """
    final, max_refinements, growth = plans
    ratio = jnp.maximum(problem.size / final.epsilon, 1)
    is_known, num_rounds = jnp.isfinite(previous.scale), candidates.scale.shape[1]
    num_levels, tol = LEVELS + 1, tolerance(problem)
    search_end = num_rounds * num_levels

    def cond_fun(state: SearchState) -> Bool[Array, ""]:
        is_best = state.score == state.score.min(1, keepdims=True)
        moving = (is_best & (state.change > 1)).any()
        refining = moving & (state.iteration < search_end + max_refinements)
        return (state.iteration < search_end) | refining

    def body_fun(state: SearchState) -> SearchState:
        searching, level = state.iteration < search_end, state.iteration % num_levels
        round_index = jnp.minimum(state.iteration // num_levels, num_rounds - 1)
        new_start = jax.tree.map(lambda leaf: leaf[:, round_index], candidates)
        poses = where_rows(searching & (level == 0), new_start, state.poses)
        exponent = jnp.where(searching, 1 - jnp.minimum(level + 1, LEVELS) / LEVELS, 0)
        epsilon = final.epsilon * ratio ** exponent.astype(ratio.dtype)
        moments, score = one_sided_moments(problem, Marginals(epsilon, final.rho), poses)
        moved = best_pose(group, moments, poses, problem.ratio[:, None])
        if growth is not None:
            costs = growth(poses.scale)
            refined = best_pose(group, moments, poses, problem.ratio[:, None], costs)
            moved = where_rows(searching, moved, refined)
        better = searching & (level == LEVELS) & (score < state.best_score)
        best = where_rows(better, poses, state.best)
        best_score = jnp.where(better, score, state.best_score)
        first_poses = where_rows(jnp.broadcast_to(is_known[:, None], score.shape), repeated, best)
        return SearchState(
            iteration=state.iteration + 1,
            poses=where_rows(state.iteration == search_end - 1, first_poses, moved),
            score=jnp.where(searching, best_score, score),
            change=displacement(problem, poses, moved) / tol[:, None],
            best=best,
            best_score=best_score,
        )

    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], LANES, 1), previous)
    unbounded = jnp.full((len(is_known), LANES), jnp.inf, ratio.dtype)
    iteration = jnp.where(is_known.all(), search_end, 0).astype(jnp.int32)
    return while_loop(
        cond_fun,
        body_fun,
        SearchState(iteration, repeated, unbounded, unbounded, repeated, unbounded),
        problem,
        candidates,
        final,
    )


def tolerance(problem: Problem) -> Float[Array, " B"]:
    """Return the displacement of atoms below which a pose has converged; the error of D is of
    second order in it.
    """
    eps = float(jnp.finfo(problem.x.dtype).eps)
    farthest = jnp.abs(problem.centre).max() + jnp.abs(problem.centres).max(-1)
    size: Array = eps**0.5 * safe_sqrt(problem.size + problem.sizes)
    return size + 4 * eps * farthest


def starts(group: Group, problem: Problem, count: int | None) -> Pose:
    """Return a grid of starts (B, rounds, W), which map the mean of the pattern to that of the
    query.

    In more than three dimensions, half of them map principal axes to principal axes.
    """
    num_patterns, dim = problem.centres.shape
    grid = jnp.asarray(rotation_grid(group, dim, count), problem.x.dtype)
    grid = jnp.broadcast_to(grid[None], (num_patterns, *grid.shape))
    if group.rotations and dim > 3:
        axes = _principal_rotations(group, problem)[:, : -(-grid.shape[1] // 2)]
        grid = jnp.concatenate([axes, grid[:, : grid.shape[1] - axes.shape[1]]], 1)
    rounds = -(-grid.shape[1] // LANES)
    grid = grid[:, jnp.arange(rounds * LANES) % grid.shape[1]]
    scale = jnp.broadcast_to(problem.ratio[:, None], grid.shape[:2])
    scale = scale if group.scale else jnp.ones_like(scale)
    means = scale[..., None] * jnp.matvec(grid, problem.centres[:, None])
    shift = problem.centre[None, None] - means
    pose = Pose(grid, shift if group.translations else jnp.zeros_like(shift), scale)
    result: Pose = jax.tree.map(
        lambda leaf: leaf.reshape(num_patterns, rounds, LANES, *leaf.shape[2:]), pose
    )
    return result


def rotation_grid(group: Group, dim: int, count: int | None) -> Float[np.ndarray, "S d d"]:
    """Return rotations that do not depend on data, twice as many with reflections."""
    if not group.rotations:
        return np.eye(dim)[None]
    grid = rotations(count or STARTS.get(dim, DEFAULT_STARTS), dim)
    reflected = grid * np.where(np.arange(dim) == dim - 1, -1, 1)
    return np.concatenate([grid, reflected]) if group.reflections else grid


def _principal_rotations(group: Group, problem: Problem) -> Float[Array, "B A d d"]:
    """Return the rotations that map the principal axes of patterns to those of the query, with all
    signs of the largest ones.
    """
    dim = len(problem.centre)
    weights = jnp.exp(problem.log_weights)
    query_axes = eigh((problem.x * problem.x_weights[:, None]).T @ problem.x)[1]
    pattern_axes = eigh(jnp.matmul((problem.y * weights[..., None]).mT, problem.y))[1]
    signs = (
        np.array(np.meshgrid(*[[1.0, -1.0]] * min(dim, 7), indexing="ij"))
        .reshape(min(dim, 7), -1)
        .T
    )
    signs = np.pad(signs, [(0, 0), (dim - signs.shape[1], 0)], constant_values=1)
    candidates = jnp.einsum(
        "ik,sk,bjk->bsij", query_axes, jnp.asarray(signs, query_axes.dtype), pattern_axes
    )
    if group.reflections:
        return candidates
    determinants = determinant(candidates)
    # The axes of the least spread.
    least_axes = jnp.einsum("i,bj->bij", query_axes[:, 0], pattern_axes[..., 0])
    flipped = jnp.asarray(signs[:, 0], least_axes.dtype)[None, :, None, None] * least_axes[:, None]
    return candidates - jnp.where(determinants < 0, 2, 0)[..., None, None] * flipped
