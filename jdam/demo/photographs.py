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


#: The methods of which recall is drawn, and what is written above.
DRAWN = {
    "Bures": "recalled: Bures",
    "Bures, diagonal": "Bures, diagonal",
    "Hopfield on means": "means only",
}
#: The part of a photograph that is drawn, in pixels: from left to right and from bottom to top.
MIDDLE = (4 * BLOCK, 16 * BLOCK), (9 * BLOCK, BLOCK)


@dataclass
class Outcome:
    """What a method made of one damage."""

    nearest: np.ndarray  # which block was recalled
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
    nearest = np.asarray(result.nearest)
    return Outcome(
        nearest=nearest,
        correct=nearest == truth,
        first_guess=np.asarray(first) == truth,
        distance=distances(stored[truth], method.push(query, result.measure)),
        seconds=seconds,
    )


@jax.jit
def distances(first: jdam.Gaussian, second: jdam.Gaussian) -> jax.Array:
    """W₂ between Gaussians pair by pair."""

    def pair(g: jdam.Gaussian, h: jdam.Gaussian) -> jax.Array:
        return jdam.divergences(jdam.store(jax.tree.map(lambda x: x[None], g)), h)[0]

    return jnp.sqrt(jax.vmap(pair)(first, second))


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


@dataclass(frozen=True)
class Panel:
    """A photograph to draw, and what is said below it; `correct`, of its blocks after recall."""

    image: np.ndarray
    caption: str
    correct: np.ndarray | None = None


def panels(
    stored: np.ndarray, shown: np.ndarray, tiles: np.ndarray, outcomes: list[Outcome]
) -> list[Panel]:
    """The stored photograph, the damaged one, and the blocks of `tiles` that each method found."""
    found = [Panel(stored, ""), Panel(shown, f"error {error(shown, stored):.3f}")]
    for outcome in outcomes:
        image = from_blocks(tiles[outcome.nearest], stored.shape)
        rate = f"{100 * outcome.correct.mean():.0f} % of blocks right"
        caption = f"error {error(image, stored):.3f}, {rate}"
        found.append(Panel(image, caption, outcome.correct))
    return found


def error(image: np.ndarray, truth: np.ndarray) -> float:
    """The root mean square difference of two images, of which 1 is white."""
    return float(np.sqrt(np.mean((image - truth) ** 2)))


def draw(path: Path, rows: list[tuple[str, list[Panel]]]) -> None:
    """A row of photographs for each damage, of which a part is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = ["stored", "shown", *DRAWN.values()]
    size = (16, 2.4 * len(rows) + 0.7)
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=size, layout="constrained", squeeze=False
    )
    for (name, line), spaces in zip(rows, axes, strict=True):
        spaces[0].set_ylabel(name, fontsize=13)
        for panel, axis in zip(line, spaces, strict=True):
            show(axis, panel)
    caption = "The memory holds each block as a Gaussian. Recalled: the stored block that each "
    caption += "damaged one leads to; wrong ones are framed.\n"
    caption += "Errors are root mean squares over the whole photograph, of which a part is drawn."
    finish(figure, axes, titles, caption, path=path, dpi=110)


def show(axis: Any, panel: Panel) -> None:
    """The middle of a photograph; wrongly recalled blocks are framed."""
    from matplotlib.patches import Rectangle

    across = panel.image.shape[1] // BLOCK
    axis.imshow(np.clip(panel.image, 0, 1), interpolation="lanczos")
    axis.set(xticks=[], yticks=[], xlim=MIDDLE[0], ylim=MIDDLE[1])
    axis.spines[:].set_visible(False)
    axis.set_xlabel(panel.caption, fontsize=10)
    if panel.correct is None:
        return
    for i in np.flatnonzero(~panel.correct):
        corner = (i % across * BLOCK, i // across * BLOCK)
        frame = Rectangle(corner, BLOCK - 1, BLOCK - 1, fill=False, ec="#ff2d55b0", lw=0.8)
        axis.add_patch(frame)


def run(rng: np.random.Generator, beta: float, out: Path, tick: Callable[[str], None]) -> str:
    """Draws the figure and returns the table; calls `tick` before each recall."""
    photographs = load_photographs()
    stored = jdam.Gaussian.from_samples(np.concatenate([features(im) for im in photographs]))
    memories = {method.name: jdam.store(method.see(stored)) for method in METHODS}
    betas = {name: beta / spacing(memory) for name, memory in memories.items()}
    tiles = np.concatenate([to_blocks(image) for image in photographs])
    outcomes, before, rows = {}, {}, []
    sizes = [im.shape[0] * im.shape[1] // BLOCK**2 for im in photographs]
    for damage, (which, spoil) in DAMAGES.items():
        spoiled = spoil(photographs[which], rng)
        query = jdam.Gaussian.from_samples(features(spoiled))
        truth = sum(sizes[:which]) + np.arange(sizes[which])
        before[damage] = distances(stored[truth], query)
        for method in METHODS:
            tick(f"{damage}, {method.name}")
            memory, scaled = memories[method.name], betas[method.name]
            outcome = measure(method, memory, query, scaled, stored=stored, truth=truth)
            outcomes[method.name, damage] = outcome
        drawn = [outcomes[name, damage] for name in DRAWN]
        rows.append((damage, panels(photographs[which], spoiled, tiles, drawn)))
    draw(out / "photographs.png", rows)
    figure = out / "photographs.png"
    return f"{memories['Bures']}\n{table(outcomes, before)}\nfigure: {figure}"
