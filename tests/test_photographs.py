"""What the figure of the photographs shows."""

import matplotlib as mpl
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jdam.demo import photographs as demo

mpl.use("Agg")
import matplotlib.pyplot as plt

pytestmark = pytest.mark.full


def outcome(nearest, truth):
    empty = np.zeros(len(truth))
    right = np.array(nearest) == truth
    return demo.Outcome(np.array(nearest), right, right, empty, 0.0)


def test_recall_is_drawn_as_the_blocks_that_were_found(rng):
    stored, other = rng.uniform(size=(2, 64, 96, 3))
    tiles = np.concatenate([demo.to_blocks(other), demo.to_blocks(stored)])
    truth = 6 + np.arange(6)
    wrong = [6, 7, 8, 9, 10, 2]
    outcomes = [outcome(truth, truth), outcome(wrong, truth)]
    first, shown, right, last = demo.panels(stored, np.ones_like(stored), tiles, outcomes)
    assert_array_equal(first.image, stored)
    assert shown.caption == f"error {np.sqrt(np.mean((1 - stored) ** 2)):.3f}"
    assert_array_equal(right.image, stored)
    assert right.caption == "error 0.000, 100 % of blocks right"
    assert_array_equal(last.image[32:, 64:], other[:32, 64:])
    assert_array_equal(last.image[:, :64], stored[:, :64])
    assert last.caption.endswith(" 83 % of blocks right")


def test_wrong_blocks_are_framed(rng):
    panel = demo.Panel(rng.uniform(size=(64, 96, 3)), "", np.arange(6) != 5)
    figure, axis = plt.subplots()
    demo.show(axis, panel)
    (frame,) = axis.patches
    assert_allclose(frame.get_xy(), [64, 32])
    plt.close(figure)
