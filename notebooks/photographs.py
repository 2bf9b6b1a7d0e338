"""Two photographs as Gaussians of the pixels of their blocks, and what is done to them.

Each 32×32 block of the photographs bundled with scikit-learn is the Gaussian of its pixels'
features: colour (red, green, blue), the gradient of brightness (x, y) and position in the block
(x, y).
"""

import jax
import jax.numpy as jnp
import numpy as np

import jdam

BLOCK = 32


def load_photographs() -> list[np.ndarray]:
    """Return two photographs, (h, w, 3) in [0, 1], cropped to whole blocks."""
    from sklearn.datasets import load_sample_images

    images = [np.asarray(image, np.float32) / 255 for image in load_sample_images().images]
    return [im[: im.shape[0] // BLOCK * BLOCK, : im.shape[1] // BLOCK * BLOCK] for im in images]


def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the convolution with a Gaussian of standard deviation 1.5 pixels."""
    from PIL import Image, ImageFilter

    pixels = Image.fromarray((255 * image).round().astype(np.uint8))
    return np.asarray(pixels.filter(ImageFilter.GaussianBlur(1.5))) / 255


def dim(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the photograph with a tenth less light."""
    return 0.9 * image


def occlude(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the photograph with a grey square over a ninth of every block, anywhere in it."""
    image, side = image.copy(), BLOCK // 3
    for top in range(0, image.shape[0], BLOCK):
        for left in range(0, image.shape[1], BLOCK):
            y, x = rng.integers(0, BLOCK - side, 2)
            image[top:, left:][y : y + side, x : x + side] = 0.5
    return image


def features(image: np.ndarray) -> np.ndarray:
    """Return (blocks, pixels, 7), row by row of blocks: colour, the gradient of brightness, and
    position from −½ to ½."""
    gradient = np.gradient(image.mean(-1))
    position = np.indices(image.shape[:2]) % BLOCK / BLOCK - 0.5
    stacked = np.concatenate([image, np.stack([*gradient, *position], -1)], -1)
    h, w, c = stacked.shape
    tiles = stacked.reshape(h // BLOCK, BLOCK, w // BLOCK, BLOCK, c).swapaxes(1, 2)
    return tiles.reshape(-1, BLOCK * BLOCK, c).astype(np.float32)


@jax.jit
def distances(first: jdam.Gaussian, second: jdam.Gaussian) -> jax.Array:
    """Return W₂ between Gaussians pair by pair."""

    def pair(g: jdam.Gaussian, h: jdam.Gaussian) -> jax.Array:
        return jdam.divergences(jdam.store(jax.tree.map(lambda x: x[None], g)), h)[0]

    return jnp.sqrt(jax.vmap(pair)(first, second))
