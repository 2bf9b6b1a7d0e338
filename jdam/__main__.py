"""`python -m jdam`: the demonstrations of `jdam.demo`. They recall photographs, stored as
Gaussians, and molecules, stored as point clouds, from damaged copies and from parts, the molecules
in place and in any pose."""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np

from jdam.demo import molecules, photographs, poses

MISSING = "the demo needs scikit-learn, ase, pillow, matplotlib and tqdm: pip install 'jdam[demo]'"


def run(seed: int, beta: float, out: Path) -> None:
    """Run the demonstrations, print their tables and write their figures to the folder `out`."""
    try:
        import ase  # noqa: F401
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
        import sklearn  # noqa: F401
        from tqdm import tqdm
    except ImportError as error:
        raise SystemExit(f"jdam: {MISSING} ({error})") from error
    out.mkdir(parents=True, exist_ok=True)
    for demo in (partial(photographs.run, beta=beta), molecules.run, poses.run):
        # disable=None: tqdm shows nothing if the output is not a terminal.
        with tqdm(file=sys.stderr, bar_format="{desc} {elapsed}", disable=None) as progress:
            table = demo(np.random.default_rng(seed), out=out, tick=progress.set_description)
        print(table, end="\n\n")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, or `arguments` in its place, and call `run`."""
    parser = argparse.ArgumentParser(
        prog="python -m jdam",
        description="Recall the blocks of two photographs, stored as Gaussians, and molecules, "
        "stored as point clouds, after damage; molecules in any pose too.",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default 0)")
    parser.add_argument(
        "--beta",
        type=float,
        default=50.0,
        help="inverse temperature of the photographs, in units of 1/(median divergence between a "
        "pattern and its nearest other); molecules take jdam.suggest_beta (default 50)",
    )
    parser.add_argument("--out", type=Path, default=Path("jdam-demo"), help="folder for figures")
    options = parser.parse_args(arguments)
    if not 0 < options.beta < np.inf:
        parser.error(f"argument --beta: must be finite and > 0; got {options.beta:g}")
    if options.seed < 0:
        parser.error(f"argument --seed: must be ≥ 0; got {options.seed}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: must be a folder; {options.out} is a file")
    run(options.seed, options.beta, options.out)


if __name__ == "__main__":
    main()
