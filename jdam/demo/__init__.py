"""The demonstrations that `python -m jdam` runs, on data bundled with scikit-learn and ASE."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jdam


def finish(
    figure: Any, axes: Any, titles: list[str], caption: str, *, path: Path, dpi: int
) -> None:
    """Write a figure of rows of panels, with a title above each column, and close it."""
    import matplotlib.pyplot as plt

    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=13)
    figure.suptitle(caption, fontsize=14)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def spacing(memory: jdam.Memory) -> float:
    """The median over patterns of D to the nearest other pattern."""
    pairs = jax.vmap(jdam.divergences, (None, 0))(memory, memory.patterns)
    return float(jnp.median(jnp.where(jnp.eye(len(memory), dtype=bool), jnp.inf, pairs).min(1)))
