"""How the documentation is built: `sphinx-build -W --keep-going notebooks build/docs`.

Notebooks are shown with the outputs that are stored in them. The reference comes from docstrings,
which are written to be read in an editor, as light Markdown: the functions below turn them into
what Sphinx expects, and signatures into what the source says.
"""

import ast
import inspect
import re
import textwrap
from typing import Any

import equinox as eqx
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import jdam
import jdam.nn
import jdam.plot
import jdam.random
import jdam.theory

project = "jdam"
author = "The jdam developers"
copyright = "The jdam developers"
release = version = jdam.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
html_math_renderer = "mathml"
exclude_patterns = ["**.ipynb_checkpoints"]

nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 76
toc_object_entries_show_parents = "hide"
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "furo"
html_title = f"jdam {release}"
html_static_path = ["static"]
html_css_files = ["jdam.css"]
html_show_sphinx = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"
# Both for light and for dark pages.
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5394", "color-brand-content": "#0b5394"},
    "dark_css_variables": {"color-brand-primary": "#7fb8ec", "color-brand-content": "#7fb8ec"},
}

#: The public names, with where they are found.
MODULES = (jdam, jdam.random, jdam.theory, jdam.plot, jdam.nn)
PUBLIC = {
    name: f"{module.__name__}.{name}"
    for module in reversed(MODULES)
    for name, value in vars(module).items()
    if not name.startswith("_") and getattr(value, "__module__", "").startswith("jdam")
}


# ------------------------------------------------------------------ docstrings


def restructured(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText: paragraph by paragraph."""
    paragraphs = re.split(r"\n(?:[ ]*\n)+", "\n".join(lines).strip("\n"))
    return [*"\n\n".join(map(paragraph, paragraphs)).splitlines(), ""]


def paragraph(text: str) -> str:
    """A paragraph of a docstring: text, a list of fields, a formula or code."""
    lines = text.splitlines()
    indented = all(line.startswith("    ") for line in lines)
    text = textwrap.dedent(text) if indented else text
    if entries := fields(text):
        return "\n".join(f"- ``{name}``: {inline(what)}" for name, what in entries)
    if indented:
        language = "python" if is_code(text) else "text"
        return f".. code-block:: {language}\n\n{textwrap.indent(text, '   ')}"
    # A formula may follow its sentence without an empty line.
    end = next((i for i, line in enumerate(lines) if line.startswith("    ")), len(lines))
    if 0 < end < len(lines):
        return paragraph("\n".join(lines[:end])) + "\n\n" + paragraph("\n".join(lines[end:]))
    start = next((i for i, line in enumerate(lines) if re.match(r"[*-] ", line)), 0)
    if start:  # a list needs an empty line before it
        return paragraph("\n".join(lines[:start])) + "\n\n" + inline("\n".join(lines[start:]))
    return inline(text)


def fields(text: str) -> list[tuple[str, str]]:
    """The entries of a paragraph all of whose lines are `name: what` or go on with that."""
    entries: list[tuple[str, str]] = []
    for line in text.splitlines():
        if match := re.match(r"(\w+): +(\S.*)", line):
            entries.append((match[1], match[2]))
        elif entries and line.startswith("  "):
            entries[-1] = (entries[-1][0], f"{entries[-1][1]} {line.strip()}")
        else:
            return []
    return entries


def is_code(text: str) -> bool:
    """Whether an indented paragraph is Python, and not a formula."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def inline(text: str) -> str:
    """Text with its code, links and special characters as reStructuredText has them."""
    parts = re.split(r"(`[^`]+`)", text)
    done = ""
    for i, part in enumerate(parts):
        if i % 2 == 0:
            # Stars of bold text and of lists stay.
            done += re.sub(r"([\\|_]|(?<!\*)\*(?![* ]))", r"\\\1", part)
            continue
        before = "" if not done or done[-1].isspace() else "\\ "
        after = "" if parts[i + 1][:1] in ("", " ", "\n") else "\\ "
        done += before + code(part[1:-1]) + after
    return done


def code(text: str) -> str:
    """A span of code, as a link where it is a public name."""
    name = re.sub(r"\(.*\)$", "", text)
    target = PUBLIC.get(name.rpartition(".")[2], "")
    # A short word of a submodule, as `capacity`, is more often an argument.
    plain = target == f"jdam.{name}" or name[:1].isupper() or "_" in name
    if target and (target == name or (plain and target.endswith(f".{name}"))):
        return f":py:obj:`{text} <{target}>`"
    return f"``{text}``"


def process_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list) -> None:
    lines[:] = restructured(lines)


# ------------------------------------------------------------------ signatures


class Linked(ast.NodeTransformer):
    """Public names in annotations by their full names, shapes without outer spaces."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        known = PUBLIC.get(node.id)
        return ast.parse(known, mode="eval").body if known else node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            inner = node.value.strip()
            return ast.Name(inner) if inner in PUBLIC else ast.Constant(inner)
        return node


def annotation(node: ast.expr | None) -> ast.expr | None:
    return None if node is None else Linked().visit(node)


def definition(obj: Any) -> Any:
    """The syntax tree of a function or class."""
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))).body[0]


def arguments_of(obj: Any, skip_first: bool) -> tuple[str, str | None]:
    """The arguments and the result of a function as its source has them."""
    node = definition(obj)
    given = node.args
    if skip_first and given.args and given.args[0].arg in ("self", "cls"):
        given.args = given.args[1:]
    for argument in [*given.posonlyargs, *given.args, *given.kwonlyargs]:
        argument.annotation = annotation(argument.annotation)
    result = annotation(node.returns)
    return f"({ast.unparse(given)})", None if result is None else ast.unparse(result)


def fields_of(kind: type) -> str:
    """The arguments of a dataclass or named tuple without a constructor of its own."""
    found = [node for node in definition(kind).body if isinstance(node, ast.AnnAssign)]
    for node in found:
        node.annotation = Linked().visit(node.annotation)
    return f"({', '.join(map(ast.unparse, found))})"


def process_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, result: str
) -> tuple[str, str | None] | None:
    if what in ("function", "method") and callable(obj):
        function = getattr(obj, "__func__", obj)
        return arguments_of(function, skip_first=what == "method")
    if what == "class":
        if "__init__" in vars(obj) and inspect.isfunction(vars(obj)["__init__"]):
            try:
                return arguments_of(vars(obj)["__init__"], skip_first=True)[0], None
            except (OSError, TypeError):
                pass
        # Modules and certificates are made by functions, the others by users.
        made = issubclass(obj, eqx.Module) or obj.__module__.startswith("jdam.theory")
        own = getattr(obj, "__annotations__", None) and not inspect.isabstract(obj)
        return (fields_of(obj) if own and not made else "", None)
    return None


def shorten(app: Any, doctree: nodes.document) -> None:
    """The types of properties, which Sphinx writes itself, as they are written in the source."""
    for text in list(doctree.findall(nodes.Text)):
        if "jaxlib._jax." in text:
            text.parent.replace(text, nodes.Text(text.replace("jaxlib._jax.", "")))


# ------------------------------------------------------------------ formulas


def mathml(node: nodes.Element, *, as_block: bool) -> str:
    """TeX as MathML, which browsers show by themselves, also without a network."""
    tex = re.sub(r"(\\[dt]?frac)(\w)(\w)", r"\1{\2}{\3}", node.astext())
    tex = tex.replace(r"\dots", r"\ldots")
    return str(tex2mathml(tex, as_block=as_block))


def visit_inline(self: Any, node: nodes.Element) -> None:
    self.body.append(mathml(node, as_block=False))
    raise nodes.SkipNode


def visit_block(self: Any, node: nodes.Element) -> None:
    self.body.append(f'<div class="math">{mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("doctree-read", shorten)
