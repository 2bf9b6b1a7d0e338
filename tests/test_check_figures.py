"""`notebooks/check_figures.py` reads numbers as they are written, and finds those without a source."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "notebooks" / "check_figures.py"
spec = importlib.util.spec_from_file_location("check_figures", SCRIPT)
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("10 000 words, 3·10⁻⁵ and $2\\cdot10^{-8}$", ["10000", "3e-5", "2e-8"]),
        ("59 ± 2 %, $0.80\\pm0.13$", ["59 ± 2", "0.80±0.13"]),
        ("3 steps, `0.5`, [12](13.md), arXiv:2509.23162, (1997)", ["12"]),
    ],
)
def test_figures(text, found):
    assert check.figures(text) == found


def test_figures_are_rounded():
    stored = check.numbers("| 0.8349 | 1.043 ± 0.054 | 3750 |")
    for figure in ("0.83", "0.835", "1.04 ± 0.05", "3750"):
        assert check.occurs(figure, stored, (1,))
    for figure in ("0.84", "83", "0.83 ± 0.05", "3751"):
        assert not check.occurs(figure, stored, (1,))
    assert check.occurs("83", stored, (1, 100))


def test_figures_without_a_source_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Measured 0.25 and 0.5.\n\n```python\nx = 0.25\n```\n\n"
        "| label 77 | 88 |\n|---|---|\n| label 99 | 66 <!-- source: elsewhere --> 55 |\n\n"
        "- 44 in all\n- 33\n\n<!-- source: elsewhere -->\n"
    )
    found = [line.partition(":")[0] for line in check.unsupported(page)]
    assert found == ["0.5", "55", "44"]
