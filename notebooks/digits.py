"""Handwritten digits as clouds of ink, what is done to them, and how they look on a canvas.

Each digit bundled with scikit-learn is a cloud: the positions of its inked pixels, weighted by ink.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jdam

STORED = 50  # digits, the first five of each class
MOST_ATOMS = 64  # of a query, so that all have the same shape
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
