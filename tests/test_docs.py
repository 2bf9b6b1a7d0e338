"""Every block of Python in the documentation runs, and prints what the comments beside it say."""

import ast
import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import jdam
import jdam.nn
import jdam.plot
import jdam.random
import jdam.sklearn
import jdam.theory

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
PAGES = sorted(FOLDER.rglob("*.md"))
REFERENCE = sorted((FOLDER / "reference").glob("*.md"))
CHEAT_SHEET = FOLDER / "guides" / "cheat_sheet.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: Where users find names, and which are theirs.
MODULES = (jdam, jdam.random, jdam.theory, jdam.plot, jdam.nn, jdam.sklearn)
#: What recipes are for, and tests need not have.
OPTIONAL = {"pandas", "polars", "rdkit", "torch", "trimesh"}
PUBLIC = {
    f"{module.__name__}.{name}"
    for module in MODULES
    for name, value in vars(module).items()
    if not name.startswith("_")
    and getattr(value, "__module__", "").startswith("jdam")
    and (module is not jdam.nn or value.__module__ == "jdam.nn")
    and (module is not jdam.plot or value.__module__ == "jdam.plot")
    and (module is not jdam.sklearn or value.__module__ == "jdam.sklearn")
}


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text())


def named(page: Path) -> str:
    return str(page.relative_to(FOLDER).with_suffix(""))


def statements(code: str) -> Iterator[tuple[ast.stmt, str | None]]:
    """The statements of a block; of those that print with what the comment behind or below says."""
    lines = code.splitlines()
    for node in ast.parse(code).body:
        behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
        below = lines[node.end_lineno] if node.end_lineno < len(lines) else ""
        behind = behind or (below if below.startswith("# ") else "")
        prints = isinstance(node, ast.Expr) and ast.unparse(node).startswith("print(")
        yield node, behind.removeprefix("#").strip() if prints and behind else None


def run(code: str, scope: dict) -> None:
    """Runs a block, and fails where it prints other than its comments say; … is anything."""
    for node, said in statements(code):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module([node], []), "block", "exec"), scope)
        if said is not None:
            pattern = ".*".join(re.escape(part) for part in said.split("…"))
            got = printed.getvalue().strip()
            assert re.fullmatch(pattern, got, re.DOTALL), (
                f"{ast.unparse(node)}: {got!r} for {said!r}"
            )


def missing(code: str) -> set[str]:
    """Which optional packages a block imports that are not there."""
    nodes = list(ast.walk(ast.parse(code)))
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    wanted = {name.partition(".")[0] for name in names} & OPTIONAL
    return {name for name in wanted if importlib.util.find_spec(name) is None}


def run_page(page: Path) -> dict:
    """The names that a page's blocks leave, run in order as a user would: in float32."""
    scope: dict = {}
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for block in blocks(page):
            if not missing(block):
                run(block, scope)
    return scope


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """What pages write does not stay."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:JAXopt:DeprecationWarning")  # ott-jax imports it
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=named)
def test_page(page):
    run_page(page)


def calls_of_the_cheat_sheet() -> list[str]:
    """The right column of its table."""
    return re.findall(r"\| `([^`]+)` \|$", CHEAT_SHEET.read_text(), re.MULTILINE)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:JAXopt:DeprecationWarning")  # ott-jax imports it
def test_the_calls_of_the_cheat_sheet_run():
    scope = run_page(CHEAT_SHEET)
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for call in calls_of_the_cheat_sheet():
            exec(call, scope)


def test_the_cheat_sheet_has_every_public_function():
    calls = "\n".join(calls_of_the_cheat_sheet())
    functions = {name for name in PUBLIC if name.rpartition(".")[2].islower()}
    assert len(functions) > 50
    assert {name for name in functions if not re.search(rf"\b{name}\b", calls)} == set()


def test_blocks_are_left_out_for_optional_packages_alone():
    (package,) = OPTIONAL - (OPTIONAL - {"trimesh"})
    there = importlib.util.find_spec(package) is not None
    assert (
        missing("import trimesh\nfrom trimesh.creation import box") == set() if there else {package}
    )
    assert missing("import no_such_package, numpy") == set()
    needing = {page.stem for page in PAGES for block in blocks(page) if missing(block)}
    assert needing <= {"recipes"}


@pytest.mark.parametrize("word", ["rotation", "label", "nearest", "denois"])
def test_a_heading_of_the_guides_has_what_is_searched_for(word):
    """Which is what a search puts first."""
    pages = (FOLDER / "guides").glob("*.md")
    headings = [line for page in pages for line in page.read_text().splitlines() if line[:1] == "#"]
    assert any(word in heading.lower() for heading in headings if heading.startswith("##"))


def test_the_glossary_has_each_term_once_in_a_sentence():
    text = (FOLDER / "guides" / "glossary.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    terms = [term.strip() for term, *_ in rows[1:]]
    assert len(set(terms)) == len(terms) >= 25
    for wanted in ("measure", "pattern", "query", "memory", "geometry", "divergence", "energy", "β",
                   "Gibbs weights", "recall", "step", "fixed point", "residual", "status", "search",
                   "certificate", "separation", "Sinkhorn ε", "κ", "ρ", "inliers", "Chamfer",
                   "features", "pose", "values", "prediction set", "denoising"):  # fmt: skip
        assert any(wanted in term for term in terms), wanted
    assert all(said.endswith(".") for _, *rest in rows[1:] for said in rest[-1:])


def test_every_public_name_is_documented_once():
    text = "\n".join(page.read_text() for page in REFERENCE)
    documented = re.findall(r"^\.\. auto\w+:: (jdam\.\S+)", text, re.MULTILINE)
    assert len(PUBLIC) > 70
    assert sorted(documented) == sorted(PUBLIC)


@pytest.mark.parametrize("page", REFERENCE, ids=named)
def test_every_public_name_is_used_beside_its_documentation(page):
    documented = set(re.findall(r"^\.\. auto\w+:: (jdam\.\S+)", page.read_text(), re.MULTILINE))
    trees = [ast.parse(block) for block in blocks(page)]
    used = {
        ast.unparse(node)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    }
    assert documented <= used


@pytest.mark.full
def test_models_learn():
    """The recipes for Equinox and Flax, with an optimizer around."""
    code = [b for b in blocks(FOLDER / "guides" / "learning.md") if "x.Module" in b]
    assert len(code) == 2
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(12, 2))
    queries = jdam.Gaussian(mean, np.tile(0.3 * np.eye(2), (12, 1, 1)))
    labels = jax.numpy.arange(12) % 3
    scope = {"jax": jax, "jdam": jdam, "eqx": eqx, "queries": queries}
    scope["memory"] = jdam.store(queries[:6])
    optimizer = optax.adam(0.05)

    def error(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in code:
            run(block, scope)
        model, layer = scope["model"], scope["layer"]
        for name in ("logits", "outputs"):
            assert jax.numpy.isfinite(scope[name]).all()
        state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
        other = nnx.Optimizer(layer, optimizer, wrt=nnx.Param)

        @eqx.filter_jit
        def update(model, state):
            value, slope = eqx.filter_value_and_grad(lambda m: error(jax.vmap(m)(queries)))(model)
            change, state = optimizer.update(slope, state)
            return eqx.apply_updates(model, change), state, value

        @nnx.jit
        def update_layer(layer, other):
            value, slope = nnx.value_and_grad(lambda m: error(jax.vmap(m)(queries)))(layer)
            other.update(layer, slope)
            return value

        losses = []
        for _ in range(40):
            model, state, first = update(model, state)
            losses.append((float(first), float(update_layer(layer, other))))
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] < 0.5 * losses[0][1]
