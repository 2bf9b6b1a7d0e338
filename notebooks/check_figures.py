"""Check that the figures quoted in the documentation occur in what was measured.

    python notebooks/check_figures.py [FILE …]

A figure is a pair a ± b, a number with a decimal point or an exponent, or an integer from 10 on;
those in code, links and names do not count. It has to occur in one of its sources, rounded to the
digits quoted; signs do not count, and a per cent may be a hundredth. The sources are

    a notebook's own outputs and code; a page's own code,
    the tables of benchmarks/README.md, which are what its scripts printed,
    notebooks and benchmarks that the paragraph or row links to; if to none, those that a page does

The first cell of a row is its label, and is not checked; a row that names tests and no notebook is
left to the tests. A figure from elsewhere has a mark, `<!-- source: … -->`. It stands for the text
before it, back to the previous mark or to the start of the paragraph or row; as a paragraph of its
own it stands for the paragraph or table above. If it names files, separated by commas, figures
have to occur there. Other marks say where figures are from, and nothing is checked.
"""

import functools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
BENCHMARKS = ROOT / "benchmarks" / "README.md"
PAGES = (ROOT / "README.md", BENCHMARKS, *FOLDER.glob("*.md"), *FOLDER.glob("guides/*.md"))

MARK = re.compile(r"<!-- source: (.*?) -->", re.DOTALL)
CODE = re.compile(r"^ *```.*?^ *```$|\n\n(?:    [^\n]*\n)+", re.DOTALL | re.MULTILINE)
NAMES = re.compile(
    r"(?<=\])\([^)]*\)|https?://\S+|`[^`]*`|\b\d{4}\.\d{5}\b|\((?:19|20)\d\d\)|^#.*$", re.MULTILINE
)
NUMBER = r"(?<![\w.])\d*\.?\d+(?:e[-+]?\d+)?(?![\w]|\.\d)"
FIGURE = re.compile(rf"{NUMBER}(?: ?± ?{NUMBER})?")
THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:[ \u00a0\u2009\u202f_]|\\,)\d{3})+(?!\d)")
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


def plain(text: str) -> str:
    """The text with its numbers written as Python writes them, and without TeX commands."""
    for tex, sign in (("−", "-"), (r"\cdot", "·"), (r"\times", "×"), (r"\pm", "±")):
        text = text.replace(tex, sign)
    text = THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = re.sub(r"10([⁰¹²³⁴-⁹⁻]+)", lambda found: f"10^{found[1].translate(SUPERSCRIPTS)}", text)
    power = r"(?:([\d.]+) ?[·×] ?)?\b10(?:\^|\*\*)\{?(-?\d+)\}?"
    text = re.sub(power, lambda found: f"{found[1] or 1}e{found[2]}", text)
    return re.sub(r"\\[dt]?(?:frac|sqrt)\d*|\\[a-zA-Z]+", " ", text)


@functools.cache
def numbers(text: str) -> set[tuple[float, ...]]:
    """The numbers of a text, and its pairs."""
    found = {tuple(map(float, figure.split("±"))) for figure in FIGURE.findall(plain(text))}
    return found | {(number,) for pair in found for number in pair}


def figures(text: str) -> list[str]:
    found = FIGURE.findall(plain(NAMES.sub(" ", text)))
    return [figure for figure in found if not figure.isdigit() or int(figure) >= 10]


def rounds(number: float, quoted: str) -> bool:
    """Whether a number is the quoted one after rounding."""
    digits, _, exponent = quoted.strip().partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return abs(number - float(quoted)) <= 0.5001 * unit


def occurs(figure: str, stored: set[tuple[float, ...]], scales: tuple[int, ...]) -> bool:
    quoted = figure.split("±")
    return any(
        len(found) == len(quoted) and all(map(rounds, (scale * x for x in found), quoted))
        for found in stored
        for scale in scales
    )


def cells(path: Path, kind: str) -> list[str]:
    found = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


@functools.cache
def measured(path: Path, prose: bool) -> str:
    """What a file has of measurements and settings; for other files with its prose about them."""
    text = path.read_text()
    if path == BENCHMARKS:
        return "\n".join(line for line in text.splitlines() if line.startswith("|"))
    if path.suffix != ".ipynb":
        return text if prose else "\n".join(CODE.findall(text))
    found = cells(path, "code") + (cells(path, "markdown") if prose else [])
    for output in (x for cell in json.loads(text)["cells"] for x in cell.get("outputs", [])):
        data = output.get("data", {})
        shown = data.get("text/markdown") or data.get("text/plain", "")
        found.append("".join(output.get("text") or ("" if "image/png" in data else shown)))
    return "\n".join(found)


def linked(text: str, folder: Path) -> list[Path]:
    """The notebooks and pages of measurements that a text links to."""
    links = re.findall(r"\]\(([^)#\s]+)", text)
    files = [(folder / link).resolve() for link in links if not link.startswith("http")]
    files = [BENCHMARKS if file == FOLDER / "benchmarks.md" else file for file in files]
    return [f for f in files if f.suffix == ".ipynb" or f in (BENCHMARKS, FOLDER / "README.md")]


def passages(text: str) -> Iterator[str]:
    """Paragraphs, entries of lists, and rows of tables without their labels, with their marks."""
    text = re.sub(r"\n\n+(?=<!-- source: )", "\n", CODE.sub("\n\n", text))
    for block in re.split(r"\n\n+|\n(?=[-*] )", text):
        if not block.startswith("|"):
            yield block
            continue
        rows = block.splitlines()
        mark = rows.pop() if rows[-1].startswith("<!-- ") else ""
        yield from (row.partition(" | ")[2] + mark for row in rows[2:])


def unsupported(path: Path) -> Iterator[str]:
    """The figures of a file that occur in none of their sources, each with its passage."""
    page = path.suffix == ".md"
    texts = [path.read_text()] if page else cells(path, "markdown")
    everywhere = linked(texts[0], path.parent) if page else []
    for passage in (passage for text in texts for passage in passages(text)):
        here = linked(passage, path.parent)
        if re.search(r"`test_|`tests/", passage) and not here:
            continue
        *marked, rest = MARK.split(passage)
        for segment, mark in [*zip(marked[::2], marked[1::2], strict=True), (rest, "")]:
            names = mark.split(", ") if mark else []
            if not all(re.fullmatch(r"[\w/]+\.[a-z]+", name) for name in names):
                continue
            sources = [ROOT / name for name in names] or [path, *(here or everywhere)]
            stored = numbers("\n".join(measured(file, file != path) for file in sources))
            for figure in figures(segment):
                if not occurs(figure, stored, (1, 100) if "%" in segment else (1,)):
                    yield f"{figure}: {' '.join(segment.split())[:90]}"


if __name__ == "__main__":
    chosen = [Path(name).resolve() for name in sys.argv[1:]]
    chosen = chosen or [*sorted(PAGES), *sorted(FOLDER.glob("*.ipynb"))]
    wrong = [f"{path.relative_to(ROOT)}: {line}" for path in chosen for line in unsupported(path)]
    print("\n".join(wrong) or "all figures occur in their sources")
    sys.exit(bool(wrong))
