"""Recall handwritten digits, stored as weighted point clouds, from damaged ink.

Each digit bundled with scikit-learn is a cloud: the positions of its inked pixels, weighted by
ink. The queries are the same clouds after a shift, jitter, erasure or stray ink. A memory of
pixel vectors sees both drawn on a canvas twice as wide.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdam
from jdam.demo import spacing

STORED, ASKED = 50, 20  # digits, the first five of each class, and the first two of them
MOST_ATOMS = 64  # of a query, so that all have the same shape
EPSILON = 0.5  # in squared pixels
MARGIN = 4  # pixels of canvas on each side of a digit

#: Positions (n, 2), row and column in pixels, and ink (n,).
Ink = tuple[np.ndarray, np.ndarray]


def load_digits() -> list[Ink]:
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    chosen = np.concatenate([np.flatnonzero(labels == k)[: STORED // 10] for k in range(10)])
    digits = []
    for image in images[chosen].reshape(-1, 8, 8):
        positions = np.argwhere(image > 0)
        digits.append((positions.astype(float), image[tuple(positions.T)]))
    return digits


def shift(ink: Ink, rng: np.random.Generator) -> Ink:
    """Moved by half a pixel in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    return ink[0] + 0.5 * np.array([np.sin(angle), np.cos(angle)]), ink[1]


def jitter(ink: Ink, rng: np.random.Generator) -> Ink:
    """Every atom moved by normal noise of standard deviation half a pixel."""
    return ink[0] + rng.normal(0, 0.5, ink[0].shape), ink[1]


def erase(ink: Ink, rng: np.random.Generator) -> Ink:
    """Without the tenth of the atoms that lies farthest in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    along = ink[0] @ np.array([np.sin(angle), np.cos(angle)])
    kept = np.argsort(along)[: -(len(along) // 10)]
    return ink[0][kept], ink[1][kept]


def clutter(ink: Ink, rng: np.random.Generator) -> Ink:
    """With six stray atoms anywhere on the canvas, together a tenth as heavy as the digit."""
    strays = rng.uniform(-MARGIN, 8 + MARGIN - 1, (6, 2))
    weights = np.full(6, ink[1].sum() / 60)
    return np.concatenate([ink[0], strays]), np.concatenate([ink[1], weights])


DAMAGES: dict[str, Callable[[Ink, np.random.Generator], Ink]] = {
    "shift": shift,
    "jitter": jitter,
    "erasure": erase,
    "clutter": clutter,
}


def clouds(inks: list[Ink], atoms: int | None = None) -> jdam.PointCloud:
    points = [p.astype(np.float32) for p, _ in inks]
    weights = [(w / w.sum()).astype(np.float32) for _, w in inks]
    batch = jdam.PointCloud.from_ragged(points, weights)
    return batch if atoms is None else batch.pad(atoms)


def draw_pixels(cloud: jdam.PointCloud) -> jax.Array:
    """Ink shared among the four pixels around each atom; canvases as vectors of norm 1."""
    side = 8 + 2 * MARGIN
    grid = jnp.arange(-MARGIN, side - MARGIN, dtype=cloud.dtype)
    grid = grid.reshape((1,) * cloud.points.ndim + (side,))
    near = jnp.maximum(1 - jnp.abs(cloud.points[..., None] - grid), 0)  # (…, n, 2, side)
    canvas = jnp.einsum("...n,...ni,...nj->...ij", cloud.weights, near[..., 0, :], near[..., 1, :])
    vectors = canvas.reshape(*canvas.shape[:-2], -1)
    result: jax.Array = vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return result


@dataclass(frozen=True)
class Method:
    """A memory to compare, and how it sees a cloud."""

    name: str
    memory: jdam.Memory
    see: Callable[[jdam.PointCloud], jdam.PointCloud | jax.Array]
    beta: float


def methods(stored: jdam.PointCloud, beta: float) -> list[Method]:
    sinkhorn = []
    for kappa in (0.0, 1.0):
        geometry = jdam.Sinkhorn(EPSILON, hellinger_scale=kappa, tol=1e-4)
        sinkhorn.append((f"SHK, κ = {kappa:g}", jdam.store(stored, geometry)))
    pixels = draw_pixels(stored)
    hopfield = jdam.store(pixels, jdam.DotProduct())
    scale = spacing(sinkhorn[0][1])
    found = [Method(name, memory, lambda cloud: cloud, beta / scale) for name, memory in sinkhorn]
    # On vectors of norm 1 the inner product at 2β is the distance at β.
    inverse = 2 * beta / spacing(jdam.store(pixels))
    return [*found, Method("Hopfield on pixels", hopfield, draw_pixels, inverse)]


@dataclass
class Outcome:
    recalled: jdam.PointCloud | jax.Array
    correct: np.ndarray
    first_guess: np.ndarray  # was the nearest pattern to the query itself the right one?
    distance: np.ndarray | None  # √2S_ε between what was recalled and the truth
    seconds: float


def _recall(memory: jdam.Memory, query: Any, beta: Any) -> tuple[jdam.Recall, jax.Array]:
    """What is recalled, and the nearest pattern of the query itself."""
    first = jnp.argmin(jdam.divergences(memory, query))
    return jdam.recall(memory, query, beta, max_steps=6), first


@jax.jit
def _distances(first: jdam.PointCloud, second: jdam.PointCloud) -> jax.Array:
    """√(2 S_ε) between clouds pair by pair: a W₂ distance, blurred."""

    def pair(p: jdam.PointCloud, q: jdam.PointCloud) -> jax.Array:
        alone = jdam.store(jax.tree.map(lambda leaf: leaf[None], p), jdam.Sinkhorn(EPSILON))
        return jdam.divergences(alone, q)[0]

    return jnp.sqrt(2 * jnp.maximum(jax.vmap(pair)(first, second), 0))


def measure(
    method: Method, truth: np.ndarray, stored: jdam.PointCloud, query: jdam.PointCloud, recall: Any
) -> Outcome:
    arguments = method.memory, method.see(query), method.beta
    compiled = recall.lower(*arguments).compile()
    start = time.perf_counter()
    result, first = jax.block_until_ready(compiled(*arguments))
    seconds = (time.perf_counter() - start) / len(truth)
    clouds = isinstance(result.measure, jdam.PointCloud)
    return Outcome(
        recalled=result.measure,
        correct=np.asarray(result.nearest) == truth,
        first_guess=np.asarray(first) == truth,
        distance=np.asarray(_distances(stored[truth], result.measure)) if clouds else None,
        seconds=seconds,
    )


def table(outcomes: dict[tuple[str, str], Outcome], before: dict[str, np.ndarray]) -> str:
    head = f"{'recalled, %  (nearest neighbour, %)':36}"
    head += "".join(f"{damage:>12}" for damage in DAMAGES)
    head += f"{'pixels to truth':>18}{'ms/query':>10}"
    lines = [head, "─" * len(head)]
    start = np.mean(np.concatenate(list(before.values())))
    for name in dict.fromkeys(name for name, _ in outcomes):
        row = [outcomes[name, damage] for damage in DAMAGES]
        cells = [f"{100 * o.correct.mean():.0f} ({100 * o.first_guess.mean():.0f})" for o in row]
        after = [o.distance for o in row if o.distance is not None]
        moved = f"{start:.2f} → {np.mean(np.concatenate(after)):.2f}" if after else "–"
        lines.append(
            f"{name:36}"
            + "".join(f"{cell:>12}" for cell in cells)
            + f"{moved:>18}{1e3 * np.mean([o.seconds for o in row]):>10.2f}"
        )
    return "\n".join(lines)


def draw(
    path: Path,
    stored: jdam.PointCloud,
    queries: dict[str, jdam.PointCloud],
    outcomes: dict[tuple[str, str], Outcome],
) -> None:
    """A row of clouds for each damage: two digits, shown, recalled with κ = 0 and κ = 1, true."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for name, _ in outcomes))
    picked = (4, 15)  # a two and a seven
    titles = ["shown", f"recalled: {names[0]}", names[1], "stored"]
    low, high = -MARGIN - 0.5, 8 + MARGIN - 0.5
    figure, axes = plt.subplots(
        len(DAMAGES), len(picked) * len(titles), figsize=(16, 8.6), layout="constrained"
    )
    for line, damage in zip(axes, DAMAGES, strict=True):
        for block, digit in enumerate(picked):
            shown = [(queries[damage][digit], "#555555")]
            for name in names[:2]:
                outcome = outcomes[name, damage]
                colour = "#0072b2" if outcome.correct[digit] else "#ff2d55"
                recalled = outcome.recalled
                assert isinstance(recalled, jdam.PointCloud)
                shown.append((recalled[digit], colour))
            shown.append((stored[digit], "#222222"))
            for (cloud, colour), axis in zip(shown, line[block * len(titles) :], strict=False):
                # Points are (row, column), and rows count downwards.
                jdam.plot.cloud(cloud, axes=(1, 0), size=2200, color=colour, ax=axis)
                axis.set(xlim=(low, high), ylim=(high, low), xticks=[], yticks=[], aspect="equal")
                axis.spines[:].set_color("#cccccc")
        line[0].set_ylabel(damage, fontsize=13)
    for axis, title in zip(axes[0], titles * len(picked), strict=True):
        axis.set_title(title, fontsize=11)
    figure.suptitle(
        "Each digit is a cloud of ink. Recall moves atoms by barycentric maps; with κ > 0 it also "
        "reweights them, and stray ink fades. Red: recalled as another digit.",
        fontsize=13,
    )
    figure.savefig(path, dpi=90)
    plt.close(figure)


def run(rng: np.random.Generator, beta: float, out: Path, tick: Callable[[str], None]) -> str:
    """Draws the figure and returns the table; calls `tick` before each recall."""
    digits = load_digits()
    stored = clouds(digits)
    truth = np.flatnonzero(np.arange(STORED) % (STORED // 10) < ASKED // 10)
    compared = methods(stored, beta)
    recall = jax.jit(jax.vmap(_recall, (None, 0, None)))
    outcomes, before, queries = {}, {}, {}
    for damage, spoil in DAMAGES.items():
        queries[damage] = clouds([spoil(digits[i], rng) for i in truth], MOST_ATOMS)
        before[damage] = np.asarray(_distances(stored[truth], queries[damage]))
        for method in compared:
            tick(f"{damage}, {method.name}")
            found = measure(method, truth, stored, queries[damage], recall)
            outcomes[method.name, damage] = found
    draw(out / "digits.png", stored[truth], queries, outcomes)
    return f"{compared[0].memory}\n{table(outcomes, before)}\nfigure: {out / 'digits.png'}"
