"""The README's example runs and says what it says it does."""

import re
from pathlib import Path

import jax

import jdam

README = Path(__file__).parent.parent / "README.md"


def test_example(capsys):
    code = "".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
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
    points = jax.numpy.asarray(scope["shapes"][0])[None].repeat(2, 0)
    zeros = jax.numpy.zeros((2, 20), points.dtype)
    params = {"points": points, "logits": zeros, "log_beta": zeros[0, 0], "values": zeros[:, :3]}
    query = jdam.PointCloud(scope["shapes"][0])
    slope = jax.jit(jax.grad(lambda params: scope["loss"](params, query, 1)))(params)
    assert all(jax.numpy.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


def test_every_public_name_is_in_the_table():
    text = README.read_text()
    public = [
        n for n in vars(jdam) if not n.startswith("_") and not hasattr(vars(jdam)[n], "__path__")
    ]
    names = [n for n in public if getattr(vars(jdam)[n], "__module__", "").startswith("jdam")]
    assert len(names) > 15
    assert [n for n in names if f"`{n}" not in text] == ["Trace"]
