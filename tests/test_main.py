"""The demo, on some of its damages."""

import subprocess
import sys

import numpy as np
import pytest

from jdam.__main__ import main
from jdam.demo import molecules, poses
from jdam.demo import photographs as demo


def rates(lines, names):
    """The percentages recalled in the first column of each method's line."""
    found = {}
    for name in names:
        (line,) = [line for line in lines if line.startswith(name + "  ")]
        found[name] = int(line[len(name) :].split()[0])
    return found


@pytest.mark.full
def test_demo_draws_and_tabulates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "DAMAGES", {"blur": demo.DAMAGES["blur"]})
    monkeypatch.setattr(molecules, "DAMAGES", {"60 %, 3 strays": (0.6, molecules.STRAYS)})
    monkeypatch.setattr(molecules, "SMALLEST", 12)
    monkeypatch.setattr(poses, "DAMAGES", {"75 % of atoms": (0.75, 0)})
    folder = tmp_path / "new" / "folder"
    main(["--out", str(folder), "--seed", "3"])
    assert (folder / "photographs.png").stat().st_size > 100_000
    assert (folder / "molecules.png").stat().st_size > 20_000
    assert (folder / "poses.png").stat().st_size > 20_000
    lines = capsys.readouterr().out.splitlines()
    found = rates(lines, [method.name for method in demo.METHODS])
    assert found["Bures"] >= 90
    assert found["Bures"] >= found["Bures, diagonal"] >= 80
    found = rates(lines, list(molecules.METHODS))
    capped = found.pop("NumPy, one-sided, capped, elements")
    two_sided, vectors = list(found.values())[-2:]
    assert found[molecules.OURS] >= 80
    assert abs(capped - found[molecules.OURS]) <= 10  # a line of NumPy names as many
    assert vectors < two_sided < found[molecules.OURS]
    (shown,) = rates(lines, ["atoms told from strays, %"]).values()
    assert shown >= 90
    ours, centred, closest, _ = rates(lines, list(poses.METHODS)).values()
    assert ours >= 80
    assert abs(ours - closest) <= 20  # the same search, of few molecules
    assert centred < ours
    (off,) = [line for line in lines if line.startswith("match: the whole, if right, off, Å")]
    assert 0 < float(off.split()[-1]) < 0.15  # of cues jittered by 0.1 Å in each coordinate


def test_cues_are_parts_with_strays(rng):
    found = molecules.load_molecules()
    assert len(found) > 30
    for name in molecules.DAMAGES:
        share, strays = molecules.DAMAGES[name]
        cues = molecules.damage(found, (share, strays), rng)
        seen = molecules.cloud(cues, elements=True)
        assert seen.batch_shape == (len(found),)
        np.testing.assert_array_equal((seen.features.sum(-1) == 1) | (seen.weights == 0), True)
        for cue, molecule in zip(cues, found, strict=True):
            stray = np.isnan(cue.places[:, 0])
            assert stray.sum() == strays
            assert (~stray).sum() == round(share * len(molecule.positions))
            assert molecules.error(cue.places, cue.places) == 0
            assert molecules.told(np.where(stray, 0.1, 0.9), cue.places) == 1
            gaps = np.linalg.norm(cue.places[~stray][:, None] - molecule.positions, axis=-1)
            same = molecule.numbers[gaps.argmin(1)] == cue.numbers[~stray]
            assert gaps.min(1).max() == 0
            assert same.all()


def test_cues_are_turned_and_keep_their_distances(rng):
    found = molecules.load_molecules()
    for name, (share, strays) in poses.DAMAGES.items():
        cues = poses.turned(found, poses.DAMAGES[name], rng)
        for cue, molecule in zip(cues, found, strict=True):
            own = ~np.isnan(cue.places[:, 0])
            assert own.sum() == round(share * len(molecule.positions))
            assert (~own).sum() == strays
            spectra = poses.spectrum(cue.whole), poses.spectrum(molecule.positions)
            np.testing.assert_allclose(*spectra, atol=1e-9)
            gaps = np.linalg.norm(cue.places[own][:, None] - cue.whole, axis=-1)
            assert gaps.min(1).max() < 1e-9
            assert poses.off(cue.whole, cue, molecule) == 0


def test_closest_points_find_a_turned_molecule(rng):
    found = [molecule for molecule in molecules.load_molecules() if len(molecule.numbers) >= 11]
    cue = poses.turned(found, poses.DAMAGES["all atoms"], rng)[0]
    index, laid, belong = poses.Closest(found, 24)(cue)
    assert index == 0
    assert belong.all()
    assert poses.off(laid[: len(cue.whole)], cue, found[0]) < 0.25


@pytest.mark.parametrize("ours", [80.0, 100.0])
def test_the_text_says_where_rivals_are_as_good(ours):
    rates = {poses.OURS: [ours] * 3, "a rival": [100.0, 70.0, 90.0]}
    first = poses.verdict(rates)[0]
    named = [kind for kind in poses.DAMAGES if kind in first]
    assert first.startswith("The memory is no better than a rival here: ")
    assert named == (["all atoms"] if ours == 100 else ["all atoms", "all, 3 strays"])


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
