"""Long computations in parts, with progress bars and prompt interruption.

A compiled program cannot be interrupted. If all values are concrete, the host therefore runs one
part after another, each a bounded program of the same shape that is compiled once; Ctrl-C ends the
computation between parts. Inside `jax.jit`, the computation stays one program.
"""

import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree
from tqdm import tqdm

from jdam._core.batching import equal_parts

T = TypeVar("T")

#: Seconds until a bar is drawn if `progress` is None.
DELAY = 2.0
#: Seconds between two checks whether a part is ready, which let signals through.
NAP = 1e-3


def check_progress(progress: Any) -> bool | None:
    """Return `progress` if it is True, False or None, else raise `TypeError`."""
    if progress is not None and not isinstance(progress, bool):
        raise TypeError(f"progress must be True, False or None; got {progress!r}")
    return progress


def is_here(*trees: Any) -> bool:
    """Return whether all values are concrete, each on one device, outside of any trace."""
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.core.Tracer):
            return False
        if isinstance(leaf, Array) and len(leaf.sharding.device_set) > 1:
            return False
    return not isinstance(jnp.zeros(()), jax.core.Tracer)


def in_parts(
    part: Callable[..., T],
    sizes: tuple[int, ...],
    at_once: tuple[int, ...],
    name: str,
    progress: bool | None,
) -> T:
    """Assemble the results of `part(*starts, widths=widths)` over a grid of parts.

    **Arguments:**

    - `part`: returns a pytree whose leaves lead with axes of lengths `widths`.
    - `sizes`: the lengths of these axes in the result.
    - `at_once`: upper bounds of `widths`.
    - `name`: the title of the progress bar.
    - `progress`: True draws a bar, False none, and None draws one on a terminal after `DELAY`.

    Parts have equal sizes and may overlap; the later part overwrites the earlier."""
    widths = tuple(equal_parts(*axis)[1] for axis in zip(sizes, at_once, strict=True))
    starts = [_starts(*axis) for axis in zip(sizes, widths, strict=True)]
    whole: PyTree = None
    with tqdm(
        total=math.prod(map(len, starts)),
        desc=name,
        unit="part",
        delay=0 if progress else DELAY,
        # For None, tqdm draws no bar outside of a terminal.
        disable=None if progress is None else not progress,
    ) as bar:
        for start in itertools.product(*starts):
            values = part(*start, widths=widths)
            if widths == sizes:
                whole = values
            else:
                whole = _written(_empty(values, sizes) if whole is None else whole, values, start)
            # The device finishes all work it was given, so the next part waits for this one.
            wait(whole)
            bar.update()
    result: T = whole
    return result


def wait(tree: PyTree) -> None:
    """Wait until all values are ready. Unlike `jax.block_until_ready`, this lets signals
    through."""
    arrays: list[Any] = jax.tree.leaves(tree)
    for array in arrays:
        while not array.is_ready():
            time.sleep(NAP)


@partial(jax.jit, static_argnames="width")
def rows_from(tree: T, start: Any, *, width: int) -> T:
    """Return `width` rows of all leaves, from a traced start."""
    rows: T = jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, width, axis=0), tree
    )
    return rows


def _starts(size: int, width: int) -> list[np.int32]:
    """Return the starts of parts of `width`; the last part overlaps its predecessor to be full."""
    return [np.int32(min(start, size - width)) for start in range(0, size, width)]


def _empty(part: T, sizes: tuple[int, ...]) -> T:
    def empty(leaf: Array) -> Array:
        return jnp.zeros((*sizes, *leaf.shape[len(sizes) :]), leaf.dtype)

    whole: T = jax.tree.map(empty, part)
    return whole


@partial(jax.jit, donate_argnums=0)
def _written(whole: T, part: T, starts: tuple[PyTree, ...]) -> T:
    """Return the whole with a part written in place; the whole is donated."""

    def write(into: Array, rows: Array) -> Array:
        zeros = [np.int32(0)] * (into.ndim - len(starts))
        return jax.lax.dynamic_update_slice(into, rows, (*starts, *zeros))

    written: T = jax.tree.map(write, whole, part)
    return written
