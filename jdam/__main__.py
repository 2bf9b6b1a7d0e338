"""`python -m jdam`: the demonstration of `jdam.demo`."""

import argparse
from pathlib import Path

import numpy as np

MISSING = "the demo needs ase and matplotlib: pip install 'jdam[demo]'"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, or `arguments` in its place; run the demo, and print its table."""
    parser = argparse.ArgumentParser(
        prog="python -m jdam",
        description="Name molecules in any pose from damaged cues, complete them, draw some, and "
        "compare with methods written by hand.",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("jdam-demo"), help="folder for the figure (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"argument --seed: must be ≥ 0; got {options.seed}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: must be a folder; {options.out} is a file")
    try:
        from jdam import demo
    except ImportError as error:
        raise SystemExit(f"jdam: {MISSING} ({error})") from error
    options.out.mkdir(parents=True, exist_ok=True)
    print(demo.run(np.random.default_rng(options.seed), options.out))


if __name__ == "__main__":
    main()
