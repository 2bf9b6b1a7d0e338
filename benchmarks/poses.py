"""How well and how fast clouds are found in any pose, by the number of starts.

    python benchmarks/poses.py [--draws N]

prints a Markdown table: molecules of the G2 set that come with ASE, their elements as features,
turned at random and moved; cues are all of their atoms, parts, or all with three strays, and the
nearest that of `Aligned(Chamfer)`. Processor time is that of all threads: where others share the
machine it says more than the clock.
"""

import argparse
import time

import jax
import numpy as np

import jdam
from jdam.demo.molecules import JITTER, Molecule, clouds, cut, load_molecules

EPSILON, RHO, ELEMENT = 0.05, 0.15, 0.3  # Å²
DAMAGES = {"all atoms": (1.0, 0), "75 %": (0.75, 0), "60 %": (0.6, 0), "3 strays": (1.0, 3)}


def rotation(rng: np.random.Generator) -> np.ndarray:
    basis, upper = np.linalg.qr(rng.normal(size=(3, 3)))
    basis *= np.sign(np.diag(upper))
    basis[:, 0] *= np.sign(np.linalg.det(basis))
    return basis


def cues(molecules: list[Molecule], damage: tuple[float, int], seed: int) -> jdam.PointCloud:
    """What is left of each molecule, with strays, in a pose of its own."""
    rng, (share, strays) = np.random.default_rng(seed), damage
    points, numbers = [], []
    for molecule in molecules:
        kept = cut(molecule.positions, rng, share)
        atoms = molecule.positions[kept]
        atoms = np.vstack([atoms, rng.uniform(atoms.min(0) - 1, atoms.max(0) + 1, (strays, 3))])
        atoms = atoms + rng.normal(0, JITTER, atoms.shape)
        points.append(atoms @ rotation(rng).T + rng.normal(0, 3, 3))
        numbers.append(np.append(molecule.numbers[kept], rng.choice(molecule.numbers, strays)))
    return clouds(points, numbers).pad(max(len(one.positions) for one in molecules) + 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Recall in any pose against the number of starts.")
    parser.add_argument("--draws", type=int, default=2)
    options = parser.parse_args()
    molecules = load_molecules()
    stored = clouds([one.positions for one in molecules], [one.numbers for one in molecules])
    problems = {
        name: [cues(molecules, damage, seed) for seed in range(options.draws)]
        for name, damage in DAMAGES.items()
    }
    print(f"| starts | {' | '.join(DAMAGES)} | ms a cue | of the processor | first call, s |")
    print("|---" * (len(DAMAGES) + 4) + "|")
    inner = jdam.Chamfer(EPSILON, rho=RHO, feature_scale=ELEMENT)
    for starts in (4, 12, 24, 48):
        memory = jdam.store(stored, jdam.Aligned(inner, num_starts=starts))
        nearest = jax.jit(jax.vmap(jdam.nearest, (None, 0)))
        start = time.perf_counter()
        jax.block_until_ready(nearest(memory, problems["all atoms"][0]))
        first, rates, wall, processor = time.perf_counter() - start, [], 0.0, 0.0
        for draws in problems.values():
            right = []
            for some in draws:
                start, busy = time.perf_counter(), time.process_time()
                index, _ = jax.block_until_ready(nearest(memory, some))
                wall, processor = (
                    wall + time.perf_counter() - start,
                    processor + time.process_time() - busy,
                )
                right.append(np.mean(np.asarray(index)[:, 0] == np.arange(len(molecules))))
            rates.append(f"{100 * np.mean(right):.0f} %")
        asked = len(molecules) * options.draws * len(problems) / 1e3
        cells = " | ".join([*rates, f"{wall / asked:.0f}", f"{processor / asked:.0f}"])
        print(f"| {starts} | {cells} | {first:.1f} |", flush=True)


if __name__ == "__main__":
    main()
