"""Parts put together are the whole; they can be watched, and stopped."""

import io
import os
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdam._core import progress
from jdam._core.progress import check_progress, in_parts, is_here, rows_from, wait


def table(sizes, at_once, shown=None):
    """Row and column numbers of a table, part by part."""
    seen = []

    def part(row, column, *, widths):
        seen.append((int(row), int(column), widths))
        rows, columns = (
            start + np.arange(width) for start, width in zip((row, column), widths, strict=True)
        )
        return {
            "row": jnp.asarray(np.repeat(rows[:, None], widths[1], 1)),
            "both": jnp.asarray(np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)),
            "none": None,
        }

    return in_parts(part, sizes, at_once, "numbers", shown), seen


@pytest.mark.parametrize("sizes", [(7, 5), (1, 9), (8, 6), (3, 2)])
def test_parts_make_the_whole(sizes):
    found, seen = table(sizes, (3, 2))
    wanted = np.moveaxis(np.indices(sizes), 0, -1)
    np.testing.assert_array_equal(found["both"], wanted)
    np.testing.assert_array_equal(found["row"], wanted[..., 0])
    assert len({widths for *_, widths in seen}) == 1  # one shape, one program
    assert all(width <= most for width, most in zip(seen[0][2], (3, 2), strict=True))
    assert len(seen) == np.prod([-(-size // w) for size, w in zip(sizes, seen[0][2], strict=True)])


def test_one_part_is_the_whole():
    values = jnp.ones((2, 3))
    assert in_parts(lambda *_, widths: values, (2, 3), (2, 4), "ones", None) is values


def test_rows_from_the_middle(rng):
    values = jnp.asarray(rng.normal(size=(6, 2)))
    found = rows_from({"a": values, "b": None}, np.int32(2), width=3)
    np.testing.assert_array_equal(found["a"], values[2:5])


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("shown", "terminal", "delay", "drawn"),
    [
        (True, False, 9.0, True),
        (True, True, 9.0, True),
        (False, True, 0.0, False),
        (None, True, 0.0, True),
        (None, True, 9.0, False),  # it was not long
        (None, False, 0.0, False),
    ],
)
def test_when_a_bar_is_drawn(monkeypatch, shown, terminal, delay, drawn):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "DELAY", delay)
    table((7, 5), (3, 2), shown)
    if drawn:
        assert "numbers: 100%" in stream.getvalue()
        assert "9/9" in stream.getvalue()
    else:
        assert stream.getvalue() == ""


@pytest.mark.parametrize("wrong", [1, 0, "yes", np.bool_(True)])
def test_progress_is_a_bool_or_none(wrong):
    with pytest.raises(TypeError, match="progress must be True, False or None; got"):
        check_progress(wrong)


def test_what_is_here():
    assert is_here(jnp.ones(2), np.ones(2), {"a": None})
    held, seen = jnp.ones(2), []
    jax.jit(lambda x: seen.extend([is_here(x), is_here(held)]))(held)
    jax.vmap(lambda x: seen.append(is_here(x)))(held)
    jax.grad(lambda x: seen.append(is_here(x)) or x)(1.0)
    assert seen == [False] * 4


class Never:
    """A value that is never there."""

    def is_ready(self):
        return False


@pytest.mark.full
def test_a_signal_is_heard_while_the_device_works(interruptible):
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        wait({"a": jnp.ones(2), "b": Never()})
    timer.join()


def test_waiting_is_for_all_values(rng):
    matrix = jnp.asarray(rng.normal(size=(300, 300)))
    program = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: jnp.tanh(matrix @ y), x))
    results = [program(matrix), matrix]
    wait(results)
    assert all(result.is_ready() for result in results)


@pytest.mark.full
def test_a_signal_ends_the_parts(interruptible):
    began, count = time.monotonic(), 0

    def part(start, *, widths):
        nonlocal count
        count += 1
        if count >= 5:  # again: Python drops an exception that arises in a callback of others
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return jnp.zeros(widths)

    with pytest.raises(KeyboardInterrupt):
        in_parts(part, (10_000,), (1,), "zeros", None)
    assert count < 20
    assert time.monotonic() - began < 60
