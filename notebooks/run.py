"""Run the notebooks, each in a fresh kernel, and fail on exceptions and on warnings.

    python notebooks/run.py [--full] [--save] [--figures FOLDER] [NOTEBOOK …]

By default notebooks that would take long do less of the same; `--full` runs what was committed.
"""

import argparse
import base64
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jaxlib.version
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

FOLDER = Path(__file__).resolve().parent


def outputs(notebook: nbformat.NotebookNode) -> list[tuple[int, nbformat.NotebookNode]]:
    """All outputs, each with the number of its cell."""
    return [
        (i, output)
        for i, cell in enumerate(notebook.cells, start=1)
        for output in cell.get("outputs", [])
    ]


def execute(notebook: nbformat.NotebookNode) -> list[str]:
    """Runs the notebook in place and returns what is wrong with it."""
    where = {"metadata": {"path": str(FOLDER)}}
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources=where,
        record_timing=False,
        coalesce_streams=True,
        # Kernels warn that whoever may listen to 127.0.0.1 can read what they say.
        extra_arguments=["--log-level=ERROR"],
    )
    wrong = []
    try:
        client.execute()
    except CellExecutionError as error:
        failed = [i for i, output in outputs(notebook) if output.output_type == "error"]
        wrong += [f"cell {i}: {error}" for i in failed or ["?"]]
    except DeadKernelError:
        # Cells that ran have a number, and so has the one that did not end.
        begun = [i for i, cell in enumerate(notebook.cells, 1) if cell.get("execution_count")]
        wrong.append(f"cell {max(begun, default=0)} or the next: the kernel died")
    for i, output in outputs(notebook):
        if output.get("name") == "stderr":
            wrong.append(f"cell {i} wrote to stderr: {output.text}")
    return wrong


def save_figures(notebook: nbformat.NotebookNode, stem: Path) -> None:
    found = [output.get("data", {}).get("image/png") for _, output in outputs(notebook)]
    stem.parent.mkdir(parents=True, exist_ok=True)
    for i, png in enumerate(filter(None, found), start=1):
        stem.with_name(f"{stem.name}-{i}.png").write_bytes(base64.b64decode(png))


def run(path: Path, save: bool, figures: Path | None) -> bool:
    """Runs one notebook, says how it went, and returns whether it passed."""
    notebook, start = nbformat.read(path, as_version=4), time.perf_counter()
    wrong = execute(notebook)
    verdict = "failed" if wrong else "passed"
    print(f"{path.name:28}{verdict}{time.perf_counter() - start:8.0f} s", flush=True)
    for line in wrong:
        print(f"  {path.name}, {line}", flush=True)
    if figures:
        save_figures(notebook, figures / path.stem)
    if save and not wrong:
        nbformat.write(notebook, path)
    return not wrong


def compile_quickly() -> None:
    """Let kernels compile quickly, which takes most of the time of the short versions: programs are
    shared between notebooks, and XLA uses its older emitter, which takes less time."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(FOLDER.parent / "build/xla"))
    if jaxlib.version.__version_info__ < (0, 11):  # a version without this flag would not start
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python notebooks/run.py", description="Run notebooks.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="which (default: all of them)")
    parser.add_argument("--full", action="store_true", help="as committed, however long it takes")
    parser.add_argument("--save", action="store_true", help="run in full and keep the outputs")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write figures as PNG here")
    options = parser.parse_args()
    paths = options.notebooks or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        if not path.is_file():
            parser.error(f"no notebook at {path}")
    if options.full or options.save:
        os.environ["JDAM_FULL"] = "1"
    else:
        compile_quickly()
    # Two at a time: most of their time is compilation, which takes one core.
    with ThreadPoolExecutor(max_workers=2) as pool:
        ends = pool.map(lambda path: run(path, options.save, options.figures), paths)
        passed = sum(ends)
    print(f"{passed} passed, {len(paths) - passed} failed")
    sys.exit(passed < len(paths))


if __name__ == "__main__":
    main()
