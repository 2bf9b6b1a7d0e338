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
from jdam.demo import CHAMFER, DAMAGES, STRAYS, clouds_of, damage, load_molecules


def main() -> None:
    parser = argparse.ArgumentParser(description="Recall in any pose against the number of starts.")
    parser.add_argument("--draws", type=int, default=2)
    options = parser.parse_args()
    molecules = load_molecules()
    stored = clouds_of(molecules)
    padded = stored.num_atoms + STRAYS
    problems = {
        name: [
            clouds_of(damage(molecules, kind, np.random.default_rng(seed))).pad(padded)
            for seed in range(options.draws)
        ]
        for name, kind in DAMAGES.items()
    }
    print(f"| starts | {' | '.join(DAMAGES)} | ms a cue | of the processor | first call, s |")
    print("|---" * (len(DAMAGES) + 4) + "|")
    for starts in (4, 12, 24, 48):
        memory = jdam.store(stored, jdam.Aligned(CHAMFER, num_starts=starts))
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
