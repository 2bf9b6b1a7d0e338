"""Long computations in parts, so that they can be watched and stopped.

A compiled program hears of nothing until it has ended. Where values are known, the host asks for
part after part instead, each a program of bounded work and all of one shape, which is compiled
once; Ctrl-C ends the computation between them. Inside `jax.jit` there is one program as ever.
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
from tqdm import tqdm

from jdam._core.batching import equal_parts

T = TypeVar("T")

#: Seconds after which a bar is drawn that nobody asked for.
DELAY = 2.0
#: Seconds between two looks at whether a part is ready, and whether there was a signal.
NAP = 1e-3


def check_progress(progress: Any) -> bool | None:
    """`progress` as it is: True, False or None."""
    if progress is not None and not isinstance(progress, bool):
        raise TypeError(f"progress must be True, False or None; got {progress!r}")
    return progress


def is_here(*trees: Any) -> bool:
    """Whether all values are known, each on one device, and no program is being traced."""
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
    """What `part(*starts, widths=widths)` gives, put together: its leaves lead with axes of the
    lengths `widths`, at most `at_once`, and those of the whole with axes of `sizes`.

    Equal parts may overlap, where the later one counts. A bar of this name is drawn if `progress`
    is True, and if None on a terminal after a while."""
    widths = tuple(equal_parts(*axis)[1] for axis in zip(sizes, at_once, strict=True))
    starts = [_starts(*axis) for axis in zip(sizes, widths, strict=True)]
    found: Any = None
    with tqdm(
        total=math.prod(map(len, starts)),
        desc=name,
        unit="part",
        delay=0 if progress else DELAY,
        # None: no bar where there is no terminal.
        disable=None if progress is None else not progress,
    ) as bar:
        for place in itertools.product(*starts):
            new = part(*place, widths=widths)
            if widths == sizes:
                found = new
            else:
                found = _written(_empty(new, sizes) if found is None else found, new, place)
            # Before more is asked for: what the device was given, it ends.
            wait(found)
            bar.update()
    whole: T = found
    return whole


def wait(tree: Any) -> None:
    """Return when the values are there. Signals are heard meanwhile, which
    `jax.block_until_ready` would put off."""
    arrays: list[Any] = jax.tree.leaves(tree)
    for array in arrays:
        while not array.is_ready():
            time.sleep(NAP)


@partial(jax.jit, static_argnames="width")
def rows_from(tree: T, start: Any, *, width: int) -> T:
    """So many rows of all leaves, from a traced start."""
    rows: T = jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, width, axis=0), tree
    )
    return rows


def _starts(size: int, width: int) -> list[np.int32]:
    """The last part reaches back: all are full."""
    return [np.int32(min(start, size - width)) for start in range(0, size, width)]


def _empty(part: T, sizes: tuple[int, ...]) -> T:
    def empty(leaf: Array) -> Array:
        return jnp.zeros((*sizes, *leaf.shape[len(sizes) :]), leaf.dtype)

    whole: T = jax.tree.map(empty, part)
    return whole


@partial(jax.jit, donate_argnums=0)
def _written(whole: T, part: T, starts: tuple[Any, ...]) -> T:
    """The whole with a part in its place, without a copy of the rest."""

    def write(into: Array, rows: Array) -> Array:
        zeros = [np.int32(0)] * (into.ndim - len(starts))
        return jax.lax.dynamic_update_slice(into, rows, (*starts, *zeros))

    written: T = jax.tree.map(write, whole, part)
    return written
