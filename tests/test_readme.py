"""The README's example runs and says what it says it does."""

import re
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax
from flax import nnx

import jdam

README = Path(__file__).parent.parent / "README.md"


def test_example(capsys):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(code, scope := {})
    printed = capsys.readouterr().out
    assert printed.startswith("Recall(CONVERGED")
    assert "nearest=3" in printed
    losses = scope["learned"].losses
    assert losses[-1] < 0.2 * losses[0]
    assert int(scope["proof"].index) == 3
    assert scope["theory"].basin_radius(scope["memory"], scope["beta"]).min() > 0
    assert scope["batch"].nearest.tolist() == list(range(100))
    assert int(scope["found"].nearest) == 0
    assert int(scope["found"].status) == jdam.Status.CONVERGED
    assert len(scope["same"]) == 50
    assert scope["growing"].capacity == 100
    assert len(scope["larger"].append(scope["patterns"][:60])) == 110
    assert len(scope["append"](scope["same"], scope["patterns"][50])) == 51
    assert scope["results"].nearest.tolist() == list(range(96))
    for name in ("slopes", "logits", "outputs"):
        assert all(jax.numpy.isfinite(leaf).all() for leaf in jax.tree.leaves(scope[name]))
    assert scope["logits"].shape == scope["outputs"].shape == (100, 3)


def test_models_learn():
    """The README's recipes for Equinox and Flax, with an optimizer around."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = "\n".join(block for block in blocks if "eqx.Module" in block or "nnx.Module" in block)
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(12, 2))
    queries = jdam.Gaussian(mean, np.tile(0.3 * np.eye(2), (12, 1, 1)))
    labels = jax.numpy.arange(12) % 3
    scope = {"jax": jax, "jdam": jdam, "eqx": eqx, "queries": queries}
    scope["memory"] = jdam.store(queries[:6])
    optimizer = optax.adam(0.05)

    def error(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(code, scope)
        model, layer = scope["model"], scope["layer"]
        state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
        other = nnx.Optimizer(layer, optimizer, wrt=nnx.Param)

        @eqx.filter_jit
        def update(model, state):
            value, slope = eqx.filter_value_and_grad(lambda m: error(jax.vmap(m)(queries)))(model)
            change, state = optimizer.update(slope, state)
            return eqx.apply_updates(model, change), state, value

        @nnx.jit
        def update_layer(layer, other):
            value, slope = nnx.value_and_grad(lambda m: error(jax.vmap(m)(queries)))(layer)
            other.update(layer, slope)
            return value

        losses = []
        for _ in range(40):
            model, state, first = update(model, state)
            losses.append((float(first), float(update_layer(layer, other))))
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] < 0.5 * losses[0][1]


def test_every_public_name_is_in_the_table():
    text = README.read_text()
    public = [
        n for n in vars(jdam) if not n.startswith("_") and not hasattr(vars(jdam)[n], "__path__")
    ]
    names = [n for n in public if getattr(vars(jdam)[n], "__module__", "").startswith("jdam")]
    assert len(names) > 15
    assert [n for n in names if f"`{n}" not in text] == ["Trace"]
