"""The README is short, its example runs as it stands, and what it points to is there."""

import re

from tests.test_docs import ROOT, blocks, run_page

README = ROOT / "README.md"


def test_example():
    (code,) = blocks(README)
    assert len(code.splitlines()) <= 12
    scope = run_page(README)
    assert int(scope["result"].nearest) == 3
    assert scope["memory"].dtype == "float32"


def test_it_is_short():
    assert len(README.read_bytes()) <= 6000


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README.read_text())
    assert len(links) > 15
    for link in links:
        assert link.startswith("https://") or (ROOT / link).is_file(), link


def test_commands_are_each_one_line():
    """Those that `.ci/run` runs, word for word."""
    text = (ROOT / ".ci" / "run").read_text()
    wanted = re.findall(r"^run '(.*)'$", text, re.MULTILINE)
    assert len(wanted) == 3
    lines = README.read_text().splitlines()
    for pattern in wanted:
        found = [line for line in lines if re.search(pattern, line)]
        assert len(found) == 1, pattern
        assert found[0].startswith("python3 -m venv .venv && ")
