"""The demo, on one of its four damages."""

import subprocess
import sys

import numpy as np
import pytest

import jdam
from jdam.__main__ import main
from jdam.demo import digits
from jdam.demo import photographs as demo


def rates(lines, names):
    """The percentages recalled in the first column of each method's line."""
    found = {}
    for name in names:
        (line,) = [line for line in lines if line.startswith(name + "  ")]
        found[name] = int(line[len(name) :].split()[0])
    return found


def test_demo_draws_and_tabulates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "DAMAGES", {"blur": demo.DAMAGES["blur"]})
    monkeypatch.setattr(digits, "DAMAGES", {"jitter": digits.jitter, "clutter": digits.clutter})
    monkeypatch.setattr(digits, "STORED", 20)
    folder = tmp_path / "new" / "folder"
    main(["--out", str(folder), "--seed", "3"])
    assert (folder / "photographs.png").stat().st_size > 100_000
    assert (folder / "digits.png").stat().st_size > 20_000
    lines = capsys.readouterr().out.splitlines()
    found = rates(lines, [method.name for method in demo.METHODS])
    assert found["Bures"] >= 90
    assert found["Bures"] >= found["Bures, diagonal"] >= 80
    assert rates(lines, ["SHK, κ = 0"])["SHK, κ = 0"] >= 80  # jittered digits


def test_damaged_digits_are_clouds(rng):
    inks = digits.load_digits()[:3]
    for spoil in digits.DAMAGES.values():
        cloud = digits.clouds([spoil(ink, rng) for ink in inks], 64)
        assert cloud.points.shape == (3, 64, 2)
    cloud = jdam.PointCloud(np.array([[0.0, 2.5]]))
    canvas = digits.draw_pixels(cloud).reshape(16, 16)
    np.testing.assert_allclose(canvas[4, [6, 7]], 0.5**0.5)  # half the ink each, norm 1


def test_blocks_roundtrip(rng):
    image = rng.uniform(size=(64, 96, 3))
    np.testing.assert_array_equal(demo.from_blocks(demo.to_blocks(image), image.shape), image)


def test_features_tell_position_and_gradient():
    ramp = np.repeat(np.arange(64.0)[None, :, None] / 64, 32, axis=0).repeat(3, axis=2)
    found = demo.features(ramp)
    assert found.shape == (2, 1024, 7)
    np.testing.assert_allclose(found[:, :, 4], 1 / 64, rtol=1e-6)  # ∂/∂x of brightness
    np.testing.assert_allclose(found[:, :, 3], 0, atol=1e-7)
    np.testing.assert_allclose(found[0, :, 5:].min(0), -0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta", "-1"], "argument --beta: must be finite and > 0; got -1"),
        (["--beta", "hot"], "argument --beta: invalid float value"),
        (["--seed", "-1"], "argument --seed: must be ≥ 0"),
        (["--out", __file__], "argument --out: must be a folder"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_import_is_light_and_quiet():
    """Neither ott-jax (1.5 s, and a warning) nor plotting comes with `import jdam`."""
    code = (
        "import sys, jdam; print([m for m in ('ott', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
