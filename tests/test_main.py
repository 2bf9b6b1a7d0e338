"""The demo: its cues and rivals, and all of it on few molecules and some damages."""

import subprocess
import sys

import numpy as np
import pytest

from jdam import demo
from jdam.__main__ import main


@pytest.mark.full
def test_demo_draws_and_tabulates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "DAMAGES", {"75 % of atoms": (0.75, 0)})
    monkeypatch.setattr(demo, "SMALLEST", 12)
    folder = tmp_path / "new" / "folder"
    main(["--out", str(folder), "--seed", "3"])
    assert (folder / "poses.png").stat().st_size > 20_000
    lines = capsys.readouterr().out.splitlines()

    def cell(name):
        (line,) = [line for line in lines if line.startswith(name + "  ")]
        return float(line[len(name) :].split()[0])

    ours, closest, _ = map(cell, demo.METHODS)
    assert ours >= 80
    assert abs(ours - closest) <= 20  # the same search, of few molecules
    assert cell("match: atoms told from strays, %") >= 90
    # Of cues jittered by 0.1 Å in each coordinate.
    assert 0 < cell("match: the whole, if right, off, Å") < 0.15


@pytest.mark.parametrize("kind", demo.DAMAGES.values(), ids=demo.DAMAGES)
def test_cues_are_turned_parts_with_strays(kind, rng, monkeypatch):
    monkeypatch.setattr(demo, "JITTER", 0.0)
    molecules = demo.load_molecules()
    assert len(molecules) > 30
    share, strays = kind
    cues = demo.damage(molecules, kind, rng)
    seen = demo.clouds_of(cues)
    assert seen.batch_shape == (len(molecules),)
    np.testing.assert_array_equal((seen.features.sum(-1) == 1) | (seen.weights == 0), True)
    for cue, molecule in zip(cues, molecules, strict=True):
        assert cue.belongs.sum() == round(share * len(molecule.positions))
        assert (~cue.belongs).sum() == strays
        spectra = demo.spectrum(cue.whole), demo.spectrum(molecule.positions)
        np.testing.assert_allclose(*spectra, atol=1e-9)
        assert np.abs(cue.whole - molecule.positions).max() > 0.1
        gaps = np.linalg.norm(cue.positions[cue.belongs][:, None] - cue.whole, axis=-1)
        assert gaps.min(1).max() < 1e-9
        np.testing.assert_array_equal(molecule.numbers[gaps.argmin(1)], cue.numbers[cue.belongs])
        assert demo.off(cue.whole, cue, molecule) == 0


def test_closest_points_find_turned_molecules(rng):
    molecules = [each for each in demo.load_molecules() if len(each.numbers) >= 12]
    cues = demo.damage(molecules, demo.DAMAGES["all, 3 strays"], rng)
    found = demo.by_closest(molecules, cues)
    right = found.nearest == np.arange(len(molecules))
    assert right.mean() > 0.8
    for i in np.flatnonzero(right):
        assert demo.off(found.wholes[i], cues[i], molecules[i]) < 0.25
    told = [np.mean(found.inliers[i] == cue.belongs) for i, cue in enumerate(cues)]
    assert np.mean(told) > 0.9


@pytest.mark.parametrize("ours", [80.0, 100.0])
def test_the_text_says_where_rivals_are_as_good(ours):
    rates = {demo.OURS: np.full(4, ours), "a rival": np.array([100.0, 70.0, 90.0, 60.0])}
    first = demo.verdict(rates)[0]
    named = [kind for kind in demo.DAMAGES if kind in first]
    assert first.startswith("The memory is no better than a rival here: ")
    assert named == (["all atoms"] if ours == 100 else ["all atoms", "all, 3 strays"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "argument --seed: must be ≥ 0"),
        (["--seed", "one"], "argument --seed: invalid int value"),
        (["--out", __file__], "argument --out: must be a folder"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.delattr("jdam.demo")
    monkeypatch.setitem(sys.modules, "jdam.demo", None)
    with pytest.raises(SystemExit, match=r"pip install 'jdam\[demo\]'"):
        main(["--out", str(tmp_path)])


@pytest.mark.full
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
