"""What the figures of molecules are drawn with."""

from typing import Any

import numpy as np

#: From where atoms are seen: what lies in the middle (3,), and the two axes (3, 2) of the picture.
View = tuple[np.ndarray, np.ndarray]

COLOURS = {1: "#c8c8c8", 6: "#404040", 7: "#0072b2", 8: "#d55e00", 9: "#009e73"}
OTHER = "#cc79a7"
RIGHT, WRONG = "#009e73", "#ff2d55"
BELONGS, STRAY = "#0072b2", "#ff2d55"


def flattest(atoms: np.ndarray) -> View:
    """Return the view of a molecule's flattest side, its longest axis across."""
    centre = atoms.mean(0)
    return centre, np.linalg.svd(atoms - centre)[2][:2].T


def as_it_lies(atoms: np.ndarray, tilt: float = 0.5) -> View:
    """Return a view of a molecule's flattest side, somewhat from aside, that keeps to the axes of
    the frame in which it lies: what is turned looks turned."""
    centre = atoms.mean(0)
    normal = np.linalg.svd(atoms - centre)[2][2]
    normal = normal * np.copysign(1, normal[np.abs(normal).argmax()])
    across = np.eye(3)[np.abs(normal).argmin()]
    across = across - (across @ normal) * normal
    towards = normal + tilt * across / np.linalg.norm(across)
    towards = towards / np.linalg.norm(towards)
    upright = np.cross(towards, across)
    upright = upright / np.linalg.norm(upright)
    return centre, np.stack([np.cross(upright, towards), upright], 1)


def draw_atoms(
    axis: Any,
    where: View,
    atoms: np.ndarray,
    numbers: np.ndarray | None = None,
    shares: np.ndarray | None = None,
    *,
    bonds: bool = True,
) -> None:
    """Draw atoms in the colours of their elements where these are known, with bonds or without;
    else from red, where none of them belongs, to blue, where all of them does."""
    from matplotlib.colors import LinearSegmentedColormap

    flat = (atoms - where[0]) @ where[1]
    if numbers is None:
        ramp = LinearSegmentedColormap.from_list("belongs", [STRAY, BELONGS])
        colours = "#777777" if shares is None else ramp(shares)
        axis.scatter(*flat.T, s=130, c=colours, zorder=2)
        return
    from ase.data import covalent_radii

    reach = 1.25 * (covalent_radii[numbers][:, None] + covalent_radii[numbers][None])
    gaps = np.linalg.norm(atoms[:, None] - atoms[None], axis=-1)
    for j, k in zip(*np.nonzero(np.triu(gaps < reach, 1) & bonds), strict=True):
        axis.plot(*flat[[j, k]].T, color="#999999", linewidth=3, zorder=1)
    elements = [COLOURS.get(int(number), OTHER) for number in numbers]
    sizes = 90 + 420 * covalent_radii[numbers] ** 2
    axis.scatter(*flat.T, s=sizes, c=elements, edgecolors="#404040", linewidths=0.6, zorder=2)


def draw_links(axis: Any, where: View, ends: tuple[np.ndarray, ...], plan: np.ndarray) -> None:
    """Draw the atoms of a pattern as rings, and lines to them from those of a cue that belong to
    them."""
    cue, answer = ((atoms - where[0]) @ where[1] for atoms in ends)
    axis.scatter(*answer.T, s=330, facecolors="none", edgecolors="#999999", zorder=1)
    for j, k in zip(*np.nonzero(plan > 0.2 * plan.max()), strict=True):
        axis.plot(*np.stack([cue[j], answer[k]]).T, color="#404040", linewidth=1.5, zorder=1)


def draw_rings(axis: Any, where: View, atoms: np.ndarray, shares: np.ndarray) -> None:
    """Draw rings where the atoms of a cue are, blue around what belongs and red around strays."""
    flat = (atoms - where[0]) @ where[1]
    colours = np.where(shares > 0.5, BELONGS, STRAY)
    axis.scatter(*flat.T, s=430, facecolors="none", edgecolors=colours, linewidths=1.8, zorder=3)


def frame(axis: Any, name: str, *, right: bool) -> None:
    """Frame an answer green or red, and write its name below."""
    axis.spines[:].set(color=RIGHT if right else WRONG, linewidth=2.5)
    axis.set_xlabel(name, fontsize=11)


def window(axis: Any, reach: float) -> None:
    """Show what lies within `reach` Å of the middle, without ticks."""
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[])
    axis.set_aspect("equal")


def key(figure: Any, numbers: set[int]) -> None:
    """Write below a figure which colours stand for which elements, and what rings and dots are."""
    from ase.data import chemical_symbols
    from matplotlib.lines import Line2D

    def mark(label: str, face: str, edge: str, size: float) -> Line2D:
        drawn = Line2D([], [], marker="o", linestyle="none", markersize=size, label=label)
        drawn.set(markerfacecolor=face, markeredgecolor=edge)
        return drawn

    marks = [
        mark(chemical_symbols[number], COLOURS.get(number, OTHER), "#404040", 11)
        for number in sorted(numbers)
    ]
    marks += [mark("belongs", BELONGS, BELONGS, 9), mark("stray", STRAY, STRAY, 9)]
    marks += [mark("the pattern in its pose", "none", "#999999", 13)]
    marks += [mark("atoms of the cue", "none", BELONGS, 13)]
    figure.legend(
        handles=marks, loc="outside lower center", ncols=len(marks), fontsize=11, frameon=False
    )
