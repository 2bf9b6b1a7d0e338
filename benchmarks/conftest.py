"""Prints what was measured as the Markdown tables of README.md, one a question."""

import platform

import jax
import numpy as np
import pytest

UNITS = {"error": "relative error", "temporary": "MiB beside arguments and results"}
DIGITS = {"error": "0e", "temporary": "3g"}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def measure(benchmark):
    """Median seconds of a warmed-up, blocked call, over the pairs it treats, in microseconds: a
    cell of the table of this question. What else is known of it goes to tables of their own."""

    def run(question, row, column, function, *args, pairs=1, rounds=7, warmup=2, note="", **known):
        cell = {"question": question, "row": row, "column": column, "note": note, "pairs": pairs}
        benchmark.extra_info.update(cell, known={k: float(v) for k, v in known.items()})
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
    write = terminalreporter.write_line
    cpu = platform.processor() or platform.machine()
    write(f"\n{cpu}, JAX {jax.__version__} on {jax.devices()[0]}\n")
    tables: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    firsts: dict[tuple[str, str], float] = {}
    for b in done:
        info = b.extra_info
        micros = 1e6 * b.stats.median / info["pairs"]
        first = firsts.setdefault((info["question"], info["row"]), micros)
        time = f"{micros:.3g} µs" if micros is first else f"{micros / first:.3g} ×"
        cells = {"time a pair, the others relative to the first": time + info["note"]}
        cells |= {UNITS[k]: f"{v:.{DIGITS[k]}}" for k, v in info["known"].items()}
        for what, cell in cells.items():
            table = tables.setdefault((info["question"], what), {})
            table.setdefault(info["row"], {})[info["column"]] = cell
    for (question, what), rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        write(f"### {question}: {what}\n")
        write("| | " + " | ".join(columns) + " |")
        write("|---" * (len(columns) + 1) + "|")
        for row, cells in rows.items():
            write(f"| {row} | " + " | ".join(cells.get(column, "") for column in columns) + " |")
        write("")
