"""What a recall says of itself, for people."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jdam
from tests.helpers import gaussians

GUIDE = Path(__file__).parents[2] / "notebooks" / "guides" / "results.md"


def test_every_status_has_a_message_that_its_guide_repeats():
    listed = re.findall(r"^\| `([A-Z_]+)` \| (.*) \|$", GUIDE.read_text(), re.MULTILINE)
    assert dict(listed) == {status.name: status.message for status in jdam.Status}
    assert jdam.Status(jnp.int32(2)).message.startswith("residual > tol after max_steps")


def test_a_batch_counts_its_statuses(rng):
    memory = jdam.store(gaussians(rng, 3, 2))
    bad = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), memory.patterns)
    found = jax.vmap(jdam.recall, (None, 0, None))(memory, bad, 50.0)
    assert repr(found) == "Recall(batch of (3,): 2 CONVERGED, 1 NONFINITE)"
    assert np.asarray(found.status).tolist() == [0, 5, 0]


def test_shapes_of_results_have_a_repr(rng):
    memory = jdam.store(gaussians(rng, 3, 2))
    found = jax.eval_shape(lambda query: jdam.recall(memory, query, 5.0), memory[0])
    assert repr(found).startswith("Recall(")


def test_how_far_what_was_recalled_is_from_the_pattern(rng):
    memory = jdam.store(gaussians(rng, 4, 2))
    query = jdam.Gaussian(memory[1].mean + 0.2, memory[1].factor)
    for beta in (0.1, 5.0):
        found = jdam.recall(memory, query, beta)
        wanted = jdam.divergences(memory, found.measure)[found.nearest]
        np.testing.assert_allclose(found.divergence, wanted, atol=1e-12)


def test_out_of_reach_is_no_mixture(rng):
    memory = jdam.store(rng.normal(size=(3, 2)))
    found = jdam.recall(memory, np.full(2, 50.0), 1.0, separation=jdam.Epanechnikov())
    assert repr(found).startswith("Recall(OUT_OF_REACH after")
