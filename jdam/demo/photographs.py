"""Recall the blocks of two photographs from damaged copies.

Each 32×32 block of the photographs bundled with scikit-learn is stored as the Gaussian of its
pixels' features: colour (red, green, blue), the gradient of brightness (x, y) and position in
the block (x, y). The queries are the same blocks after noise, blur, dimming or occlusion of
the photograph.
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
from jdam.demo import finish, spacing

BLOCK = 32


def load_photographs() -> list[np.ndarray]:
    """Two photographs, (h, w, 3) in [0, 1], cropped to whole blocks."""
    from sklearn.datasets import load_sample_images

    images = [np.asarray(image, np.float32) / 255 for image in load_sample_images().images]
    return [im[: im.shape[0] // BLOCK * BLOCK, : im.shape[1] // BLOCK * BLOCK] for im in images]


def add_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of standard deviation 0.06 in every channel, clipped to [0, 1]."""
    return np.clip(image + rng.normal(0, 0.06, image.shape), 0, 1)


def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Convolution with a Gaussian of standard deviation 1.5 pixels."""
    from PIL import Image, ImageFilter

    pixels = Image.fromarray((255 * image).round().astype(np.uint8))
    return np.asarray(pixels.filter(ImageFilter.GaussianBlur(1.5))) / 255


def dim(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A tenth less light."""
    return 0.9 * image


def occlude(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A grey square over a ninth of every block, anywhere in it."""
    image, side = image.copy(), BLOCK // 3
    for top in range(0, image.shape[0], BLOCK):
        for left in range(0, image.shape[1], BLOCK):
            y, x = rng.integers(0, BLOCK - side, 2)
            image[top:, left:][y : y + side, x : x + side] = 0.5
    return image


#: What is done to which photograph.
DAMAGES: dict[str, tuple[int, Callable[..., Any]]] = {
    "noise": (0, add_noise),
    "blur": (1, blur),
    "dim": (1, dim),
    "occlusion": (0, occlude),
}


def to_blocks(image: np.ndarray) -> np.ndarray:
    """(h, w, c) → (blocks, BLOCK², c), row by row."""
    h, w, c = image.shape
    tiles = image.reshape(h // BLOCK, BLOCK, w // BLOCK, BLOCK, c).swapaxes(1, 2)
    return tiles.reshape(-1, BLOCK * BLOCK, c)


def from_blocks(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The image (h, w, c) of these blocks."""
    h, w = shape[:2]
    tiles = blocks.reshape(h // BLOCK, w // BLOCK, BLOCK, BLOCK, -1)
    return tiles.swapaxes(1, 2).reshape(h, w, -1)


def features(image: np.ndarray) -> np.ndarray:
    """(blocks, pixels, 7): colour, brightness gradient, and position from −½ to ½."""
    gradient = np.gradient(image.mean(-1))
    position = np.indices(image.shape[:2]) % BLOCK / BLOCK - 0.5
    stacked = np.concatenate([image, np.stack([*gradient, *position], -1)], -1)
    return to_blocks(stacked.astype(np.float32))


@dataclass(frozen=True)
class Method:
    """A memory to compare: how it sees a Gaussian, and what its recall does to one."""

    name: str
    see: Callable[[jdam.Gaussian], Any]
    push: Callable[[jdam.Gaussian, Any], jdam.Gaussian]


def variances(g: jdam.Gaussian) -> jax.Array:
    """The diagonal of the covariance."""
    return jnp.sum(g.factor**2, -1)


def rescale(query: jdam.Gaussian, seen: jdam.DiagonalGaussian) -> jdam.Gaussian:
    """The query after each axis is stretched to the recalled scale."""
    ratio = seen.scale / jnp.sqrt(jnp.maximum(variances(query), 1e-12))
    return jdam.Gaussian(seen.mean, ratio[..., None] * query.factor)


def split(query: jdam.Gaussian, seen: jax.Array) -> jdam.Gaussian:
    """The Gaussian of a vector (mean, vec Σ)."""
    d = query.dim
    covariance = seen[..., d:].reshape(*seen.shape[:-1], d, d)
    return jdam.Gaussian.from_covariance(seen[..., :d], covariance)


METHODS = [
    Method("Bures", lambda g: g, lambda query, seen: seen),
    Method(
        "Bures, diagonal",
        lambda g: jdam.DiagonalGaussian.from_variance(g.mean, variances(g)),
        rescale,
    ),
    Method(
        "Hopfield on (mean, vec Σ)",
        lambda g: jnp.concatenate([g.mean, g.covariance.reshape(*g.batch_shape, -1)], -1),
        split,
    ),
    Method(
        "Hopfield on means",
        lambda g: g.mean,
        lambda query, seen: jdam.Gaussian(seen, query.factor),
    ),
]


@dataclass
class Outcome:
    """What a method made of one damage."""

    recalled: jdam.Gaussian
    correct: np.ndarray
    first_guess: np.ndarray  # was the nearest pattern to the query itself the right one?
    distance: np.ndarray  # W₂ between what was recalled and the truth
    seconds: float


def measure(
    method: Method,
    memory: jdam.Memory,
    query: jdam.Gaussian,
    beta: float,
    *,
    stored: jdam.Gaussian,
    truth: np.ndarray,
) -> Outcome:
    """Recall of all queries by a method, beside the truth, and its time."""
    queries = method.see(query)
    recall = jax.jit(jax.vmap(jdam.recall, (None, 0, None)))
    compiled = recall.lower(memory, queries, beta).compile()
    start = time.perf_counter()
    result = jax.block_until_ready(compiled(memory, queries, beta))
    seconds = (time.perf_counter() - start) / len(truth)
    first = jax.vmap(lambda q: jnp.argmin(jdam.divergences(memory, q)))(queries)
    recalled = method.push(query, result.measure)
    return Outcome(
        recalled=recalled,
        correct=np.asarray(result.nearest) == truth,
        first_guess=np.asarray(first) == truth,
        distance=distances(stored[truth], recalled),
        seconds=seconds,
    )


@jax.jit
def distances(first: jdam.Gaussian, second: jdam.Gaussian) -> jax.Array:
    """W₂ between Gaussians pair by pair."""

    def pair(g: jdam.Gaussian, h: jdam.Gaussian) -> jax.Array:
        return jdam.divergences(jdam.store(jax.tree.map(lambda x: x[None], g)), h)[0]

    return jnp.sqrt(jax.vmap(pair)(first, second))


def recolour(blocks: np.ndarray, query: jdam.Gaussian, recalled: jdam.Gaussian) -> np.ndarray:
    """Pixels moved by the map x ↦ m⁺ + L⁺L⁻¹(x − m) that recall applied to their Gaussian."""
    inverse = np.linalg.pinv(np.asarray(query.factor), rcond=1e-5)
    whitened = (blocks - np.asarray(query.mean)[:, None]) @ inverse.swapaxes(-1, -2)
    moved = whitened @ np.asarray(recalled.factor).swapaxes(-1, -2)
    result: np.ndarray = np.clip(moved + np.asarray(recalled.mean)[:, None], 0, 1)[..., :3]
    return result


def table(outcomes: dict[tuple[str, str], Outcome], before: dict[str, np.ndarray]) -> str:
    """A row a method, a column a damage."""
    start = np.mean(np.concatenate(list(before.values())))
    head = f"{'recalled, %  (nearest neighbour, %)':36}"
    head += "".join(f"{damage:>12}" for damage in DAMAGES) + f"{'W₂ to truth':>16}{'µs/query':>11}"
    lines = [head, "─" * len(head)]
    for method in METHODS:
        row = [outcomes[method.name, damage] for damage in DAMAGES]
        cells = [f"{100 * o.correct.mean():.0f} ({100 * o.first_guess.mean():.0f})" for o in row]
        after = np.mean(np.concatenate([o.distance for o in row]))
        micros = 1e6 * np.mean([o.seconds for o in row])
        lines.append(
            f"{method.name:36}"
            + "".join(f"{cell:>12}" for cell in cells)
            + f"{f'{start:.3f} → {after:.3f}':>16}{micros:>11.0f}"
        )
    return "\n".join(lines)


def draw(path: Path, rows: list[tuple[str, list[tuple[np.ndarray, np.ndarray | None]]]]) -> None:
    """A row of photographs for each damage; wrongly recalled blocks are framed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    titles = ["what the memory is shown", "recalled: Bures", "Bures, diagonal", "means only"]
    size = (16, 2.75 * len(rows) + 0.5)
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=size, layout="constrained", squeeze=False
    )
    for (name, panels), line in zip(rows, axes, strict=True):
        for (image, correct), axis in zip(panels, line, strict=True):
            axis.imshow(np.clip(image, 0, 1), interpolation="lanczos")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if correct is None:
                axis.set_ylabel(name, fontsize=13)
                continue
            columns = image.shape[1] // BLOCK
            for i in np.flatnonzero(~correct):
                corner = (i % columns * BLOCK, i // columns * BLOCK)
                axis.add_patch(
                    Rectangle(corner, BLOCK - 1, BLOCK - 1, fill=False, ec="#ff2d55b0", lw=0.8)
                )
            axis.set_xlabel(f"{100 * correct.mean():.0f} % of blocks right", fontsize=10)
    caption = "Each block is a Gaussian; recall moves its pixels by optimal transport. "
    caption += "Framed: recalled as another block."
    finish(figure, axes, titles, caption, path=path, dpi=110)


def run(rng: np.random.Generator, beta: float, out: Path, tick: Callable[[str], None]) -> str:
    """Draws the figure and returns the table; calls `tick` before each recall."""
    photographs = load_photographs()
    stored = jdam.Gaussian.from_samples(np.concatenate([features(im) for im in photographs]))
    memories = {method.name: jdam.store(method.see(stored)) for method in METHODS}
    betas = {name: beta / spacing(memory) for name, memory in memories.items()}
    outcomes, before, rows = {}, {}, []
    sizes = [im.shape[0] * im.shape[1] // BLOCK**2 for im in photographs]
    for damage, (which, spoil) in DAMAGES.items():
        spoiled = spoil(photographs[which], rng)
        pixels = features(spoiled)
        query = jdam.Gaussian.from_samples(pixels)
        truth = sum(sizes[:which]) + np.arange(sizes[which])
        before[damage] = distances(stored[truth], query)
        panels: list[tuple[np.ndarray, np.ndarray | None]] = [(spoiled, None)]
        for method in METHODS:
            tick(f"{damage}, {method.name}")
            memory, scaled = memories[method.name], betas[method.name]
            outcome = measure(method, memory, query, scaled, stored=stored, truth=truth)
            outcomes[method.name, damage] = outcome
            if method.name != "Hopfield on (mean, vec Σ)":
                blocks = recolour(pixels, query, outcome.recalled)
                panels.append((from_blocks(blocks, spoiled.shape), outcome.correct))
        rows.append((damage, panels))
    draw(out / "photographs.png", rows)
    figure = out / "photographs.png"
    return f"{memories['Bures']}\n{table(outcomes, before)}\nfigure: {figure}"
