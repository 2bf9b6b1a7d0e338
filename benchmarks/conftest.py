"""Prints what was measured as the Markdown table that README.md holds."""

import platform

import jax
import numpy as np
import pytest


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def measure(benchmark):
    """Median seconds of a warmed-up, blocked call, over the pairs it treats, in microseconds;
    what else is known of the contender goes to the table too."""

    def run(row, name, function, *args, pairs=1, rounds=7, warmup=2, **extra):
        benchmark.extra_info.update(row=row, name=name, pairs=pairs, **extra)
        benchmark.pedantic(
            lambda: jax.block_until_ready(function(*args)),
            rounds=rounds,
            iterations=1,
            warmup_rounds=warmup,
        )

    return run


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    done = [b for b in session.benchmarks if not b.has_error] if session else []
    if not done:
        return
    device = jax.devices()[0]
    write = terminalreporter.write_line
    write(
        f"\nCPU {platform.processor() or platform.machine()}, JAX {jax.__version__} on {device}\n"
    )
    rows: dict[str, dict[str, dict]] = {}
    for b in done:
        info = dict(b.extra_info)
        info["micros"] = 1e6 * b.stats.median / info["pairs"]
        rows.setdefault(info["row"], {})[info["name"]] = info
    for row, cells in rows.items():
        first = next(iter(cells.values()))["micros"]
        temporary = any("temporary" in info for info in cells.values())
        extra = " temporary, MiB |" if temporary else ""
        write(f"| {row} | µs a pair | × the first | compile, s | error |{extra}")
        write("|---|---|---|---|---|" + "---|" * temporary)
        for name, info in cells.items():
            compile_s = f"{info['compile']:.2f}" if "compile" in info else ""
            error = f"{info['error']:.0e}" if "error" in info else ""
            extra = f" {info['temporary']:.3g} |" if "temporary" in info else "  |" * temporary
            write(
                f"| {name} | {info['micros']:.3g} | {info['micros'] / first:.2f} "
                f"| {compile_s} | {error} |{extra}"
            )
        write("")
