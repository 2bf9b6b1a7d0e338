"""Name molecules in any pose from damaged cues, and complete them: what `python -m jdam` runs.

The patterns are the molecules of the G2 set that comes with ASE (L. A. Curtiss et al. 1997; A. H.
Larsen et al. 2017), each as the cloud of its atoms, in Å, with the elements as features. A cue is a
molecule turned at random and moved, its atoms jittered and shuffled, some cut off, or strays added.

For each cue one call, `jdam.match` with `Aligned(Chamfer)`, says which molecule it is of, in which
pose, which of its atoms belong, and to what; the molecule in this pose is the whole, in the frame
of the cue. Two rivals do without a memory: iterated closest points (ICP), from as many rotations,
and sorted distances between atoms, which need no pose.
"""

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ase.collections import g2
from ase.data import chemical_symbols, covalent_radii
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import jdam

SMALLEST = 8  # atoms of a molecule
JITTER, STRAYS = 0.1, 3  # Å in each coordinate; atoms that do not belong
EPSILON, RHO, ELEMENT = 0.05, 0.15, 0.3  # Å²; the last is the price of another element
STARTS = 24  # rotations; of twice as many benchmarks/poses.py finds as many molecules
CHAMFER = jdam.Chamfer(EPSILON, rho=RHO, feature_scale=ELEMENT)

#: What share of the atoms is left, and how many strays are added.
DAMAGES: dict[str, tuple[float, int]] = {
    "all atoms": (1.0, 0),
    "75 % of atoms": (0.75, 0),
    "all, 3 strays": (1.0, STRAYS),
    "60 % of atoms": (0.6, 0),
}


@dataclass(frozen=True)
class Molecule:
    """The name of a molecule, its atoms (n, 3) in Å, and their atomic numbers (n,)."""

    name: str
    positions: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True)
class Cue:
    """The atoms shown (m, 3), their atomic numbers (m,), which of them belong (m,), and where all
    atoms (n, 3) of the molecule are."""

    positions: np.ndarray
    numbers: np.ndarray
    belongs: np.ndarray
    whole: np.ndarray


def load_molecules() -> list[Molecule]:
    """Return the molecules of the G2 set that have `SMALLEST` atoms and more."""
    found = [Molecule(name, g2[name].positions, g2[name].numbers) for name in g2.names]
    return [molecule for molecule in found if len(molecule.positions) >= SMALLEST]


def cut(atoms: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """Return the indices of the atoms that are left, a share of them, when those that lie farthest
    in a random direction are cut off."""
    along = atoms @ rng.normal(size=3)
    return np.sort(np.argsort(along)[: round(share * len(atoms))])


def rotation(rng: np.random.Generator, dim: int = 3) -> np.ndarray:
    """Return a rotation (dim, dim), all of them being as likely."""
    basis, upper = np.linalg.qr(rng.normal(size=(dim, dim)))
    basis = basis * np.sign(np.diag(upper))
    basis[:, 0] *= np.sign(np.linalg.det(basis))
    return basis


def damage(
    molecules: list[Molecule], kind: tuple[float, int], rng: np.random.Generator
) -> list[Cue]:
    """Return a cue for each molecule: a share of its atoms, and strays anywhere in a box that is
    2 Å wider, of elements that the molecule has; all turned at random and moved by some Å."""
    (share, strays), shown, cues = kind, [], []
    for molecule in molecules:
        kept = cut(molecule.positions, rng, share)
        atoms = molecule.positions[kept]
        stray = rng.uniform(atoms.min(0) - 1, atoms.max(0) + 1, (strays, 3))
        atoms = np.concatenate([atoms, stray])
        numbers = np.append(molecule.numbers[kept], rng.choice(molecule.numbers, strays))
        order = rng.permutation(len(atoms))
        atoms = atoms + rng.normal(0, JITTER, atoms.shape)
        shown.append((atoms[order], numbers[order], order < len(kept)))
    for molecule, (atoms, numbers, belongs) in zip(molecules, shown, strict=True):
        basis, shift = rotation(rng), rng.normal(0, 3, 3)
        atoms, whole = (each @ basis.T + shift for each in (atoms, molecule.positions))
        cues.append(Cue(atoms, numbers, belongs, whole))
    return cues


def clouds(atoms: list[np.ndarray], numbers: list[np.ndarray] | None = None) -> jdam.PointCloud:
    """Return sets of atoms (n, 3) as uniform clouds, one batch, with elements as features if their
    numbers are given."""
    points = [positions.astype(np.float32) for positions in atoms]
    features = numbers and [each[:, None] == np.arange(1, 18) for each in numbers]
    return jdam.PointCloud.from_ragged(points, features=features)


def clouds_of(some: Sequence[Any]) -> jdam.PointCloud:
    """Return molecules or cues as clouds with elements."""
    return clouds([each.positions for each in some], [each.numbers for each in some])


@dataclass
class Outcome:
    """The answers of a method: of each cue the molecule, the positions (n, 3) of its atoms, the
    share (m,) of each atom of the cue that belongs, and the plan (m, n) between the two, all
    padded; and the seconds that all cues took."""

    nearest: np.ndarray
    seconds: float
    wholes: Sequence[np.ndarray] | np.ndarray = ()
    inliers: Sequence[np.ndarray] | np.ndarray = ()
    plans: Sequence[np.ndarray] | np.ndarray = ()


def by_memory(molecules: list[Molecule], cues: list[Cue]) -> Outcome:
    """Return what `jdam.match` says in any pose, of all cues in one call, compiled before."""
    memory = jdam.store(clouds_of(molecules), jdam.Aligned(CHAMFER, num_starts=STARTS))
    seen = clouds_of(cues).pad(memory.patterns.num_atoms + STRAYS)
    match = jax.jit(jax.vmap(jdam.match, (None, 0))).lower(memory, seen).compile()
    start = time.perf_counter()
    found = jax.block_until_ready(match(memory, seen))
    seconds = time.perf_counter() - start
    nearest, inliers, plans = map(np.asarray, (found.index, found.inliers, found.plan))
    wholes = np.asarray(found.pose(memory[nearest]).points)
    return Outcome(nearest, seconds, wholes, inliers, plans)


def motion(cross: np.ndarray) -> np.ndarray:
    """Return the rotations R of largest ⟨R, H⟩ for matrices H (…, d, d)."""
    left, _, right = np.linalg.svd(cross)
    left[..., -1] *= np.sign(np.linalg.det(left @ right))[..., None]
    return np.asarray(left @ right)


def closest(
    cue: Cue, points: np.ndarray, numbers: np.ndarray, turns: np.ndarray
) -> tuple[int, np.ndarray, np.ndarray]:
    """Return what iterated closest points find from the rotations `turns`: the nearest molecule,
    its atoms in the frame of the cue, and which atoms of the cue are nearer to it than ρ.

    The molecules are padded, with the number 0. A partner is the atom of least ½|x−y|², with the
    price of another element. The motion is the best for the atoms whose partner is nearer than a
    cap, which falls from the size of the cue to ρ as ε does in `jdam.Aligned`. The best four starts
    of each molecule are then repeated with the cap at ρ, and compared by the capped distance."""
    centre = cue.positions.mean(0)
    x = (cue.positions - centre).astype(np.float32)
    price = ELEMENT * (cue.numbers[:, None] != numbers[:, None])
    price = (price + np.where(numbers > 0, 0, 1e6)[:, None]).astype(np.float32)
    price = price + 0.5 * (points**2).sum(-1)[:, None]
    row, size = np.arange(len(points))[:, None], (x**2).sum(1).mean()

    def look(turns: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        laid = (x - shift[:, :, None]) @ turns
        costs = price - laid @ np.swapaxes(points, 1, 2)
        costs += 0.5 * (laid**2).sum(-1)[..., None]
        return costs.argmin(-1), costs.min(-1)

    turns = np.repeat(turns[:, None], len(points), 1)
    shift = np.zeros(turns.shape[:-1], np.float32)
    for step in range(14):
        partner, cost = look(turns, shift)
        if step == 7:
            best = np.minimum(cost, RHO).mean(-1).argsort(0)[:4, :, None]
            turns = np.take_along_axis(turns, best[..., None], 0)
            shift, partner, cost = (
                np.take_along_axis(each, best, 0) for each in (shift, partner, cost)
            )
        weights = (cost < RHO * (size / RHO) ** max(0, 1 - step / 6)) + np.float32(1e-6)
        weights = weights / weights.sum(-1, keepdims=True)
        target = points[row, partner]
        to, back = weights @ x, (weights[..., None, :] @ target)[..., 0, :]
        ways = weights[..., None] * (x - to[:, :, None])
        turns = motion(np.swapaxes(ways, 2, 3) @ (target - back[:, :, None]))
        shift = to - (turns @ back[..., None])[..., 0]
    costs = look(turns, shift)[1]
    scores = np.minimum(costs, RHO).mean(-1)
    at, nearest = np.unravel_index(scores.argmin(), scores.shape)
    laid = points[nearest] @ turns[at, nearest].T + shift[at, nearest] + centre
    return int(nearest), laid, costs[at, nearest] < RHO


def by_closest(molecules: list[Molecule], cues: list[Cue]) -> Outcome:
    """Return what iterated closest points find, in NumPy, on all cores."""
    held = clouds([each.positions - each.positions.mean(0) for each in molecules])
    most = held.num_atoms
    numbers = np.stack([np.pad(each.numbers, (0, most))[:most] for each in molecules])
    rng = np.random.default_rng(0)
    turns = np.stack([rotation(rng) for _ in range(STARTS)]).astype(np.float32)
    find = partial(closest, points=np.asarray(held.points), numbers=numbers, turns=turns)
    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        nearest, wholes, belong = zip(*pool.map(find, cues), strict=True)
    return Outcome(np.array(nearest), time.perf_counter() - start, wholes, belong)


def spectrum(atoms: np.ndarray) -> np.ndarray:
    """Return 32 quantiles of the distances between atoms."""
    gaps = np.linalg.norm(atoms[:, None] - atoms[None], axis=-1)
    return np.asarray(np.quantile(gaps[np.triu_indices(len(atoms), 1)], np.linspace(0, 1, 32)))


def by_invariants(molecules: list[Molecule], cues: list[Cue]) -> Outcome:
    """Return the molecules of nearest sorted distances and numbers of atoms of each element."""

    def rows(some: Sequence[Any]) -> np.ndarray:
        counts = [np.bincount(each.numbers, minlength=18) for each in some]
        return np.hstack([[spectrum(each.positions) for each in some], counts])

    start = time.perf_counter()
    gaps = np.abs(rows(cues)[:, None] - rows(molecules)[None]).sum(-1)
    return Outcome(gaps.argmin(1), time.perf_counter() - start)


OURS, CLOSEST = "jdam.match, Aligned(Chamfer)", f"ICP from {STARTS} starts"
METHODS: dict[str, Callable[[list[Molecule], list[Cue]], Outcome]] = {
    OURS: by_memory,
    CLOSEST: by_closest,
    "sorted distances, element counts": by_invariants,
}


def off(whole: np.ndarray, cue: Cue, molecule: Molecule) -> float:
    """Return the root mean square distance, in Å, from the true atoms in the frame of the cue to
    the nearest of the same element in a right answer. It does not ask which of several like atoms
    is which: of a symmetric molecule nobody can tell."""
    gaps = ((cue.whole[:, None] - whole[: len(cue.whole)]) ** 2).sum(-1)
    gaps = np.where(molecule.numbers[:, None] == molecule.numbers[None], gaps, np.inf)
    return float(np.sqrt(gaps.min(1).mean()))


def table(molecules: list[Molecule], cues: list[Cue], outcomes: dict[str, Outcome]) -> str:
    """Return the rates of right molecules by method and damage, and the time; then how well the
    whole is laid and strays are told; then in words what follows."""
    truth = np.arange(len(cues)) % len(molecules)
    head = f"{'right molecule, %':36}" + "".join(f"{kind:>15}" for kind in DAMAGES) + "  ms/cue"
    lines, rates = [head, "─" * len(head)], {}

    def line(name: str, scores: Any, form: str) -> np.ndarray:
        means: np.ndarray = np.nanmean(np.reshape(scores, (len(DAMAGES), -1)), 1)
        lines.append(f"{name:36}" + "".join(f"{mean:>15{form}}" for mean in means))
        return means

    for name, found in outcomes.items():
        rates[name] = line(name, 100 * (found.nearest == truth), ".0f")
        lines[-1] += f"{1e3 * found.seconds / len(cues):>8.1f}"
    lines.append("")
    for name, word in ((OURS, "match"), (CLOSEST, "ICP")):
        found = outcomes[name]
        gaps = [
            off(whole, cue, molecules[i]) if i == j else np.nan
            for whole, cue, i, j in zip(found.wholes, cues, truth, found.nearest, strict=True)
        ]
        pairs = zip(found.inliers, cues, strict=True)
        told = [100 * np.mean((x[: len(cue.belongs)] > 0.5) == cue.belongs) for x, cue in pairs]
        line(f"{word}: the whole, if right, off, Å", gaps, ".2f")
        line(f"{word}: atoms told from strays, %", told, ".0f")
    return "\n".join([*lines, "", *verdict(rates)])


def verdict(rates: dict[str, np.ndarray]) -> list[str]:
    """Return in words which rivals name as many molecules as the memory, and what it adds."""
    lines = []
    for name, row in rates.items():
        pairs = zip(DAMAGES, row >= rates[OURS], strict=True)
        equal = "; ".join(kind for kind, as_good in pairs if as_good)
        if name != OURS and equal:
            lines.append(f"The memory is no better than {name} here: {equal}.")
    return [
        *lines,
        "ICP, written by hand, is the same search: it lays the whole on the cue too, and its cap",
        "tells strays. Sorted distances give a name alone. The memory gives name and pose, and the",
        "partner and share of each atom, of all cues in one vmapped call that has derivatives.",
    ]


COLOURS = {1: "#c8c8c8", 6: "#404040", 7: "#0072b2", 8: "#d55e00"}
OTHER, RIGHT, BELONGS, STRAY = "#cc79a7", "#009e73", "#0072b2", "#ff2d55"

#: Which molecule is drawn for which damage: well known ones.
DRAWN = {"all atoms": "CH3CH2OH", "75 % of atoms": "trans-butane", "all, 3 strays": "C5H5N"}
TITLES = ["stored", "shown: a cue, turned", "match: which atoms belong"]
TITLES += ["completed, in the cue's frame"]


def view_of(atoms: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return a view of a molecule's flattest side, somewhat from aside, that keeps to the axes of
    the frame in which it lies: what is turned looks turned."""
    centre = atoms.mean(0)
    normal = np.linalg.svd(atoms - centre)[2][2]
    normal = normal * np.copysign(1, normal[np.abs(normal).argmax()])
    across = np.eye(3)[np.abs(normal).argmin()]
    across = across - (across @ normal) * normal
    across = across / np.linalg.norm(across)
    axes = np.stack([(across - normal / 2) / 1.25**0.5, np.cross(normal, across)], 1)
    return lambda points: (points - centre) @ axes


def draw_atoms(axis: Any, flat: np.ndarray, numbers: np.ndarray, atoms: Any = None) -> None:
    """Draw atoms at `flat` (n, 2) in the colours of their elements, with bonds between those that
    are near if `atoms` (n, 3) are given."""
    if atoms is not None:
        reach = 1.25 * (covalent_radii[numbers][:, None] + covalent_radii[numbers])
        gaps = np.linalg.norm(atoms[:, None] - atoms, axis=-1)
        for j, k in np.argwhere(np.triu(gaps < reach, 1)):
            axis.plot(*flat[[j, k]].T, color="#999999", linewidth=3, zorder=1)
    colours = [COLOURS.get(int(number), OTHER) for number in numbers]
    sizes = 90 + 420 * covalent_radii[numbers] ** 2
    axis.scatter(*flat.T, s=sizes, c=colours, edgecolors="#404040", linewidths=0.6, zorder=2)


def draw_match(
    axis: Any, cue: np.ndarray, whole: np.ndarray, shares: np.ndarray, plan: np.ndarray
) -> None:
    """Draw the atoms of a pattern as rings, those of a cue from red, where none of an atom belongs,
    to blue, where all of it does, and lines between those that belong to each other."""
    axis.scatter(*whole.T, s=330, facecolors="none", edgecolors="#999999", zorder=1)
    for j, k in np.argwhere(plan > 0.2 * plan.max()):
        axis.plot(*np.stack([cue[j], whole[k]]).T, color="#404040", linewidth=1.5, zorder=1)
    ramp = LinearSegmentedColormap.from_list("belongs", [STRAY, BELONGS])
    axis.scatter(*cue.T, s=130, c=ramp(shares), zorder=2)


def draw(path: Path, molecules: list[Molecule], cues: list[Cue], ours: Outcome) -> None:
    """Draw a row for each damage: molecule, cue, which of its atoms belong, and the whole."""
    kinds = [kind for kind in DAMAGES if kind in DRAWN]
    figure = Figure((3.1 * len(TITLES), 3.1 * len(kinds) + 0.6), layout="constrained")
    axes = figure.subplots(len(kinds), len(TITLES), squeeze=False)
    names = [molecule.name for molecule in molecules]
    for line, kind in zip(axes, kinds, strict=True):
        i = names.index(DRAWN[kind])
        at = list(DAMAGES).index(kind) * len(molecules) + i
        molecule, cue, guess = molecules[i], cues[at], molecules[ours.nearest[at]]
        own, lain, size = view_of(molecule.positions), view_of(cue.whole), len(cue.numbers)
        answer, shares = ours.wholes[at][: len(guess.numbers)], ours.inliers[at][:size]
        stored, shown, whole = own(molecule.positions), lain(cue.positions), lain(answer)
        plan = ours.plans[at][:size, : len(answer)]
        draw_atoms(line[0], stored, molecule.numbers, molecule.positions)
        draw_atoms(line[1], shown, cue.numbers)
        draw_match(line[2], shown, whole, shares, plan)
        draw_atoms(line[3], whole, guess.numbers, answer)
        rings = np.where(shares > 0.5, BELONGS, STRAY)
        line[3].scatter(*shown.T, s=430, fc="none", ec=rings, lw=1.8, zorder=3)
        line[0].set_ylabel(kind, fontsize=13)
        line[0].set_xlabel(molecule.name, fontsize=11)
        line[3].set_xlabel(guess.name, fontsize=11)
        line[3].spines[:].set(color=RIGHT if guess is molecule else STRAY, linewidth=2.5)
        reach = max(np.abs(flat).max() for flat in (stored, shown, whole)) + 0.6
        for axis in line:
            axis.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[])
            axis.set_aspect("equal")
    for axis, title in zip(axes[0], TITLES, strict=True):
        axis.set_title(title, fontsize=13)
    figure.suptitle("Molecules in any pose: which atoms belong, and the whole", fontsize=14)
    marks = [(chemical_symbols[n], colour, "#404040", 11) for n, colour in COLOURS.items()]
    marks += [("belongs", BELONGS, BELONGS, 9), ("stray", STRAY, STRAY, 9)]
    marks += [("the pattern in its pose", "none", "#999999", 13)]
    marks += [("atoms of the cue", "none", BELONGS, 13)]
    key = [
        Line2D([], [], marker="o", ls="none", ms=size, label=label, mfc=face, mec=edge)
        for label, face, edge, size in marks
    ]
    figure.legend(
        handles=key, loc="outside lower center", ncols=len(key), fontsize=11, frameon=False
    )
    figure.savefig(path, dpi=90)


def run(rng: np.random.Generator, out: Path) -> str:
    """Draw the figure in the folder `out`, and return the table."""
    molecules = load_molecules()
    cues = [cue for kind in DAMAGES.values() for cue in damage(molecules, kind, rng)]
    outcomes = {}
    for name, method in METHODS.items():
        print(name, "…", file=sys.stderr, flush=True)
        outcomes[name] = method(molecules, cues)
    draw(out / "poses.png", molecules, cues, outcomes[OURS])
    head = f"{len(molecules)} molecules, each turned at random and moved, {CHAMFER} in Å"
    return f"{head}\n{table(molecules, cues, outcomes)}\nfigure: {out / 'poses.png'}"
