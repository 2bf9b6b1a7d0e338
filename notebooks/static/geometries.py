"""Draws the small pictures of "Which geometry?", beside this file: what belongs to what by each.

    python notebooks/static/geometries.py

Lines are the plans of `jdam.match`, arrows the way of `jdam.recall`.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np

import jdam

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Circle, Ellipse

FOLDER = Path(__file__).resolve().parent
STORED, CUE, STRAY, LINK = "#9a9a9a", "#0072b2", "#d55e00", "#404040"


def outline(count: int) -> np.ndarray:
    """Points at equal steps on a closed curve without symmetries."""
    angle = np.linspace(0, 2 * np.pi, 1000)
    radius = 1 + 0.12 * np.cos(2 * angle + 0.7) + 0.17 * np.cos(3 * angle)
    curve = np.stack([1.75 * radius * np.cos(angle), 1.35 * radius * np.sin(angle)], 1)
    along = np.append(0, np.linalg.norm(np.diff(curve, axis=0), axis=1).cumsum())
    at = np.arange(count) / count * along[-1]
    return np.stack([np.interp(at, along, x) for x in curve.T], 1)


def panel() -> tuple[Any, Any]:
    figure, axis = plt.subplots(figsize=(2.4, 1.7), dpi=100)
    figure.subplots_adjust(0, 0, 1, 1)
    axis.set(xlim=(-2.72, 2.72), ylim=(-1.93, 1.93), aspect="equal")
    axis.axis("off")
    return figure, axis


def save(figure: Any, name: str) -> None:
    figure.savefig(FOLDER / f"geometry-{name}.png", facecolor="white")
    plt.close(figure)


def links(axis: Any, starts: np.ndarray, ends: np.ndarray, plan: np.ndarray) -> None:
    for j, k in np.argwhere(plan > 0.15 * plan.max()):
        strength = plan[j, k] / plan.max()
        axis.plot(*np.stack([starts[j], ends[k]]).T, color=LINK, lw=1.2, alpha=strength, zorder=1)


def atoms(axis: Any, points: np.ndarray, colour: Any, size: Any = 26, **style: Any) -> None:
    axis.scatter(*np.asarray(points).T, s=size, color=colour, lw=0, zorder=2, **style)


def rings(axis: Any, points: np.ndarray, size: Any = 44) -> None:
    axis.scatter(*np.asarray(points).T, s=size, facecolors="none", edgecolors=STORED, lw=1.3)


def ellipse(axis: Any, mean: np.ndarray, covariance: np.ndarray, colour: str, **style: Any) -> None:
    sizes, axes = np.linalg.eigh(covariance)
    turn = np.degrees(np.arctan2(axes[1, 1], axes[0, 1]))
    width, height = 3 * np.sqrt(sizes[::-1])
    style = {"facecolor": "none", "edgecolor": colour, "lw": 1.8} | style
    axis.add_patch(Ellipse(mean, width, height, angle=turn, **style))


def arrow(axis: Any, start: Any, end: Any, **style: Any) -> None:
    style = {"arrowstyle": "-|>", "color": LINK, "lw": 1.4, "shrinkA": 2, "shrinkB": 2} | style
    axis.annotate("", np.asarray(end), np.asarray(start), arrowprops=style, zorder=3)


def spread(angle: float, long: float, short: float) -> np.ndarray:
    axes = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return axes @ np.diag([long**2, short**2]) @ axes.T


def bures() -> None:
    """Two Gaussians of one mean, and one elsewhere; the cue's spread says which."""
    figure, axis = panel()
    means = np.array([[0.8, 0.1], [0.8, 0.1], [-1.9, 1.35]])
    spreads = np.stack([spread(0.6, 0.95, 0.25), spread(-0.9, 0.8, 0.3), spread(0.2, 0.4, 0.3)])
    memory = jdam.store(jdam.Gaussian.from_covariance(means, spreads))
    mean, covariance = np.array([-0.9, -0.75]), spread(0.5, 0.8, 0.22)
    found = jdam.recall(memory, jdam.Gaussian.from_covariance(mean, covariance), 50.0)
    for one in zip(means, spreads, strict=True):
        ellipse(axis, *one, STORED)
    ellipse(axis, mean, covariance, CUE, facecolor="#0072b230")
    arrow(axis, mean, found.measure.mean)
    save(figure, "bures")


def mixtures() -> None:
    """Three clumps each, and which belongs to which."""
    figure, axis = panel()
    means = np.array([[-1.6, 0.7], [0.1, -0.9], [1.6, 0.5]])
    spreads = np.stack([spread(0.3, 0.5, 0.25), spread(1.5, 0.4, 0.3), spread(-0.7, 0.55, 0.2)])
    moved = means + np.array([[0.45, -0.75], [-0.75, 0.25], [-0.65, 0.35]])
    turned = np.stack([spread(0.5, 0.45, 0.2), spread(1.2, 0.45, 0.25), spread(-0.6, 0.5, 0.22)])
    each = np.full(3, 1 / 3)
    pattern = jdam.GaussianMixture(each, means, np.linalg.cholesky(spreads))
    cue = jdam.GaussianMixture(each, moved, np.linalg.cholesky(turned))
    memory = jdam.store([pattern])
    links(axis, moved, means, np.asarray(jdam.match(memory, cue).plan))
    for one in zip(means, spreads, strict=True):
        ellipse(axis, *one, STORED)
    for one in zip(moved, turned, strict=True):
        ellipse(axis, *one, CUE, facecolor="#0072b230")
    save(figure, "mixture")


def balanced(rng: np.random.Generator) -> None:
    """A whole shape, jittered."""
    figure, axis = panel()
    shape = outline(18)
    cue = shape + rng.normal(0, 0.2, shape.shape)
    memory = jdam.store(jdam.PointCloud(shape[None]), jdam.Sinkhorn(0.02))
    links(axis, cue, shape, np.asarray(jdam.match(memory, jdam.PointCloud(cue)).plan))
    rings(axis, shape)
    atoms(axis, cue, CUE)
    save(figure, "sinkhorn")


def unbalanced(rng: np.random.Generator) -> None:
    """Most of a shape, with more mass on its left and less on its right, and a stray."""
    figure, axis = panel()
    shape = outline(18)
    kept = outline(18)[(np.arange(18) > 2) & (np.arange(18) < 17)]
    cue = np.concatenate([kept + rng.normal(0, 0.12, kept.shape), [[0.1, 0.0]]])
    mass = np.where(cue[:, 0] < 0, 1.5, 0.7)
    geometry = jdam.Sinkhorn(0.02, rho=0.1)
    memory = jdam.store(jdam.PointCloud(shape[None]), geometry)
    found = jdam.match(memory, jdam.PointCloud(cue, mass / mass.sum()))
    links(axis, cue, shape, np.asarray(found.plan))
    rings(axis, shape)
    belongs = np.asarray(found.plan).sum(1) > 0.2 * mass / mass.sum()
    atoms(axis, cue, np.where(belongs, CUE, STRAY), 24 * mass)
    save(figure, "sinkhorn-rho")


def one_sided(rng: np.random.Generator) -> None:
    """A third of a shape and three strays, each with its reach √ρ."""
    figure, axis = panel()
    shape = outline(18)
    cue = shape[:6] + rng.normal(0, 0.12, (6, 2))
    cue = np.concatenate([cue, [[-0.2, 0.05], [-2.3, -1.4], [2.1, -1.5]]])
    rho = 0.1
    memory = jdam.store(jdam.PointCloud(shape[None]), jdam.Chamfer(0.02, rho=rho))
    found = jdam.match(memory, jdam.PointCloud(cue))
    links(axis, cue, shape, np.asarray(found.plan))
    rings(axis, shape)
    belongs = np.asarray(found.inliers) > 0.5
    for stray in cue[~belongs]:
        circle = {"fill": False, "color": STRAY, "lw": 0.8, "ls": ":"}
        axis.add_patch(Circle(stray, np.sqrt(rho), **circle))
    atoms(axis, cue, np.where(belongs, CUE, STRAY))
    save(figure, "chamfer")


def aligned(rng: np.random.Generator) -> None:
    """Half of a shape, turned and moved, and the stored shape laid on it."""
    figure, axis = panel()
    shape, angle = 0.62 * outline(18), 1.9
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    cue = (shape @ turn.T)[:9] + rng.normal(0, 0.04, (9, 2)) + np.array([1.6, 0.0])
    stored = shape - np.array([1.5, 0.0])
    geometry = jdam.Aligned(jdam.Chamfer(0.005, rho=0.1))
    memory = jdam.store(jdam.PointCloud(stored[None]), geometry)
    found = jdam.match(memory, jdam.PointCloud(cue))
    laid = np.asarray(found.pose(memory[0]).points)
    rings(axis, stored)
    axis.scatter(*laid.T, s=44, facecolors="none", edgecolors=STORED, lw=1, ls=":")
    atoms(axis, cue, CUE)
    arrow(axis, (-0.65, 0.95), (1.0, 1.25), connectionstyle="arc3,rad=-0.35")
    save(figure, "aligned")


def vectors() -> None:
    """Stored vectors and the way of a recall."""
    figure, axis = panel()
    stored = np.array([[-1.7, 0.9], [0.4, 1.1], [1.6, -0.7], [-0.9, -1.1]])
    memory = jdam.store(stored)
    start = np.array([0.35, -0.35])
    found = jdam.recall(memory, jnp.asarray(start), 0.9, save_trace=True)
    steps = np.asarray(found.trace.measure)[: int(found.num_steps)]
    for here, there in zip([start, *steps[:-1]], steps, strict=True):
        if np.linalg.norm(there - here) > 0.15:
            arrow(axis, here, there, shrinkA=0, shrinkB=0)
    rings(axis, stored, 60)
    atoms(axis, start[None], CUE, 34)
    save(figure, "euclidean")


if __name__ == "__main__":
    bures()
    mixtures()
    balanced(np.random.default_rng(0))
    unbalanced(np.random.default_rng(1))
    one_sided(np.random.default_rng(2))
    aligned(np.random.default_rng(3))
    vectors()
