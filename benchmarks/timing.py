"""How scripts measure: compiled, warmed up, blocked."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Timed(NamedTuple):
    result: Any
    seconds: float  # the median of some calls
    compile: float  # seconds of lowering and compiling
    temporary: float  # MiB that XLA allocates beside arguments and results


def timed(
    function: Callable[..., Any], *args: Any, rounds: int = 5, at_most: float = math.inf
) -> Timed:
    """A function measured in so many calls, fewer once these have taken `at_most` seconds."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    compiling = time.perf_counter() - start
    result = jax.block_until_ready(compiled(*args))
    seconds: list[float] = []
    while len(seconds) < rounds and sum(seconds) < at_most:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - start)
    analysis = compiled.memory_analysis()
    temporary = analysis.temp_size_in_bytes / 2**20 if analysis else math.nan
    return Timed(result, float(np.median(seconds)), compiling, temporary)
