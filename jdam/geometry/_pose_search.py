"""Where poses come from: many starts, and one-sided plans that become ever sharper."""

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
from jdam.geometry._alignment import Group, Problem, Softness, best_pose, explain, moved_by
from jdam.geometry._poses import Pose, choose_rows, rotations

#: How many levels of ε each start goes through, from the size of a query to ε.
LEVELS = 6
#: How many lanes go through the starts, and refine the best of theirs.
LANES = 4
#: How often a pose is refined at most.
REFINEMENTS = 64
#: How many starts there are in so many dimensions, and in more.
STARTS, MANY = {1: 4, 2: 16, 3: 48}, 128


class Lanes(NamedTuple):
    """A search for poses of B patterns in W lanes."""

    turns: Int[Array, ""]
    poses: Pose
    score: Float[Array, "B W"]  # of these: less is better
    change: Float[Array, "B W"]  # how far the last turn moved atoms, in units of the tolerance
    best: Pose  # at the ends of starts
    best_score: Float[Array, "B W"]


class Plans(NamedTuple):
    """How a search compares: by which ε and ρ in the end, how often it then refines at most, and
    what patterns cost themselves at a scale (B, W); see `best_pose`."""

    soft: Softness
    refinements: int
    own: Callable[[Array], Array] | None = None


def search(group: Group, held: Problem, last: Pose, fresh: Pose, plans: Plans) -> Lanes:
    """Poses from the starts `fresh` (B, rounds, W). Each lane goes through its share of them, in
    every one with ε falling from the size of the query; then it refines the best it has, until that
    of the best lane is at rest. If all `last` poses are known these alone are refined."""
    soft, refinements, own = plans
    most = jnp.maximum(held.size / soft.epsilon, 1)
    known, rounds = jnp.isfinite(last.scale), fresh.scale.shape[1]
    per, tol = LEVELS + 1, tolerance(held)
    end = rounds * per

    def unfinished(state: Lanes) -> Bool[Array, ""]:
        first = state.score.argmin(1)[:, None]
        moves = (jnp.take_along_axis(state.change, first, 1) > 1).any()
        return (state.turns < end) | (moves & (state.turns < end + refinements))

    def turn(state: Lanes) -> Lanes:
        searching, level = state.turns < end, state.turns % per
        of_round = jnp.minimum(state.turns // per, rounds - 1)
        begun = jax.tree.map(lambda leaf: leaf[:, of_round], fresh)
        poses = choose_rows(searching & (level == 0), begun, state.poses)
        height = jnp.where(searching, 1 - jnp.minimum(level + 1, LEVELS) / LEVELS, 0)
        epsilon = soft.epsilon * most ** height.astype(most.dtype)
        found, score = explain(held, Softness(epsilon, soft.rho), poses)
        moved = best_pose(group, found, poses, held.ratio[:, None])
        if own is not None:
            exact = best_pose(group, found, poses, held.ratio[:, None], own(poses.scale))
            moved = choose_rows(searching, moved, exact)
        better = searching & (level == LEVELS) & (score < state.best_score)
        best = choose_rows(better, poses, state.best)
        best_score = jnp.where(better, score, state.best_score)
        again = choose_rows(jnp.broadcast_to(known[:, None], score.shape), same, best)
        return Lanes(
            turns=state.turns + 1,
            poses=choose_rows(state.turns == end - 1, again, moved),
            score=jnp.where(searching, best_score, score),
            change=moved_by(held, poses, moved) / tol[:, None],
            best=best,
            best_score=best_score,
        )

    same = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], LANES, 1), last)
    infinite = jnp.full((len(known), LANES), jnp.inf, most.dtype)
    turns = jnp.where(known.all(), end, 0).astype(jnp.int32)
    return while_loop(
        unfinished, turn, Lanes(turns, same, infinite, infinite, same, infinite), held, fresh, soft
    )


def tolerance(held: Problem) -> Float[Array, " B"]:
    """How far atoms may still move where a pose is at rest: D feels the square of it."""
    eps = float(jnp.finfo(held.x.dtype).eps)
    farthest = jnp.abs(held.centre).max() + jnp.abs(held.centres).max(-1)
    size: Array = eps**0.5 * safe_sqrt(held.size + held.sizes)
    return size + 4 * eps * farthest


def starts(group: Group, held: Problem, count: int | None) -> Pose:
    """A net of rotations (B, rounds, W), with the means laid on each other. In more than three
    dimensions some lay principal axes on principal axes."""
    many, dim = held.centres.shape
    turns = jnp.asarray(net(group, dim, count), held.x.dtype)
    turns = jnp.broadcast_to(turns[None], (many, *turns.shape))
    if group.rotations and dim > 3:
        axes = _axes(group, held)[:, : -(-turns.shape[1] // 2)]
        turns = jnp.concatenate([axes, turns[:, : turns.shape[1] - axes.shape[1]]], 1)
    rounds = -(-turns.shape[1] // LANES)
    turns = turns[:, jnp.arange(rounds * LANES) % turns.shape[1]]
    scale = jnp.broadcast_to(held.ratio[:, None], turns.shape[:2])
    scale = scale if group.scale else jnp.ones_like(scale)
    means = scale[..., None] * jnp.matvec(turns, held.centres[:, None])
    shift = held.centre[None, None] - means
    pose = Pose(turns, shift if group.translations else jnp.zeros_like(shift), scale)
    apart: Pose = jax.tree.map(
        lambda leaf: leaf.reshape(many, rounds, LANES, *leaf.shape[2:]), pose
    )
    return apart


def net(group: Group, dim: int, count: int | None) -> Float[np.ndarray, "S d d"]:
    """Rotations that do not depend on data, with reflections twice as many."""
    if not group.rotations:
        return np.eye(dim)[None]
    found = rotations(count or STARTS.get(dim, MANY), dim)
    mirrored = found * np.where(np.arange(dim) == dim - 1, -1, 1)
    return np.concatenate([found, mirrored]) if group.reflections else found


def _axes(group: Group, held: Problem) -> Float[Array, "B A d d"]:
    """What lays the principal axes of patterns on those of the query, in all directions of the
    largest ones."""
    dim = len(held.centre)
    weights = jnp.exp(held.log_weights)
    axes = eigh((held.x * held.x_weights[:, None]).T @ held.x)[1]
    own = eigh(jnp.matmul((held.y * weights[..., None]).mT, held.y))[1]
    signs = (
        np.array(np.meshgrid(*[[1.0, -1.0]] * min(dim, 7), indexing="ij"))
        .reshape(min(dim, 7), -1)
        .T
    )
    signs = np.pad(signs, [(0, 0), (dim - signs.shape[1], 0)], constant_values=1)
    found = jnp.einsum("ik,sk,bjk->bsij", axes, jnp.asarray(signs, axes.dtype), own)
    if group.reflections:
        return found
    proper = determinant(found)
    last = jnp.einsum("i,bj->bij", axes[:, 0], own[..., 0])  # of the least spread
    turned = jnp.asarray(signs[:, 0], last.dtype)[None, :, None, None] * last[:, None]
    return found - jnp.where(proper < 0, 2, 0)[..., None, None] * turned
