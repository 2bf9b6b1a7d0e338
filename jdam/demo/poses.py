"""Recall molecules in any pose, from parts and amid strays, and complete them where they lie.

The molecules are those of `jdam.demo.molecules`. Their cues are turned at random and moved, and
jittered and shuffled besides. Of each of them one call, `jdam.match` with `Aligned(Chamfer)`, says
which molecule it is of, in which pose, which of its atoms belong, and to what: the molecule in this
pose is the whole, in the frame of the cue. Beside it: the same divergence without poses, iterated
closest points (ICP) from as many rotations, and sorted distances between atoms, which need no pose.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import wrap
from typing import Any

import jax
import numpy as np

import jdam
from jdam.demo import finish
from jdam.demo._drawing import (
    as_it_lies,
    draw_atoms,
    draw_links,
    draw_rings,
    flattest,
    frame,
    key,
    window,
)
from jdam.demo.molecules import (
    STRAYS,
    Cue,
    Molecule,
    Outcome,
    cloud,
    damage,
    error,
    load_molecules,
    mean_of,
    told,
)

EPSILON, RHO, ELEMENT = 0.05, 0.15, 0.3  # Å²; the last is the price of another element
STARTS = 24  # rotations; of twice as many benchmarks/poses.py finds as many molecules
CHAMFER = jdam.Chamfer(EPSILON, rho=RHO, feature_scale=ELEMENT)

#: What share of the atoms is left, and how many strays are added.
DAMAGES: dict[str, tuple[float, int]] = {
    "all atoms": (1.0, 0),
    "75 % of atoms": (0.75, 0),
    "all, 3 strays": (1.0, STRAYS),
}


@dataclass(frozen=True)
class Turned(Cue):
    """A cue in a pose of its own, and where all atoms (n, 3) of its molecule are in this pose."""

    whole: np.ndarray


def rotation(rng: np.random.Generator) -> np.ndarray:
    """Return a rotation in space, all of them being as likely."""
    basis, upper = np.linalg.qr(rng.normal(size=(3, 3)))
    basis = basis * np.sign(np.diag(upper))
    basis[:, 0] *= np.sign(np.linalg.det(basis))
    return basis


def turn(cue: Cue, molecule: Molecule, rng: np.random.Generator) -> Turned:
    """Turn a cue at random and move it by some Å."""
    basis, shift = rotation(rng), rng.normal(0, 3, 3)
    shown, places, whole = (
        atoms @ basis.T + shift for atoms in (cue.positions, cue.places, molecule.positions)
    )
    return Turned(shown, places, cue.numbers, whole)


def turned(
    molecules: list[Molecule], kind: tuple[float, int], rng: np.random.Generator
) -> list[Turned]:
    """Return a cue for each molecule, damaged as by `damage` and in a pose of its own."""
    cues = damage(molecules, kind, rng)
    return [turn(cue, molecule, rng) for cue, molecule in zip(cues, molecules, strict=True)]


#: From the stored molecules and all cues to what is made of these.
Method = Callable[[list[Molecule], list[Turned]], Outcome]


def compiled(function: Callable[..., Any], memory: jdam.Memory, cues: list[Any]) -> Any:
    """Return what a function of a memory and a cue makes of all cues in one call, and the seconds
    that this takes without compilation."""
    seen = cloud(cues, elements=True).pad(memory.patterns.num_atoms + STRAYS)
    batch = jax.jit(jax.vmap(function, (None, 0))).lower(memory, seen).compile()
    start = time.perf_counter()
    found = jax.block_until_ready(batch(memory, seen))
    return found, time.perf_counter() - start


def by_memory(molecules: list[Molecule], cues: list[Turned]) -> Outcome:
    """Return all that `jdam.match` says in any pose."""
    geometry = jdam.Aligned(CHAMFER, num_starts=STARTS)
    memory = jdam.store(cloud(molecules, elements=True), geometry)
    found, seconds = compiled(jdam.match, memory, cues)
    nearest, inliers, plans = map(np.asarray, (found.index, found.inliers, found.plan))
    whole = np.asarray(found.pose(memory[nearest]).points)
    shown = [len(cue.positions) for cue in cues]
    sizes = [len(molecules[i].positions) for i in nearest]
    return Outcome(
        nearest,
        seconds,
        [row[:size] for row, size in zip(whole, sizes, strict=True)],
        [row[:size] for row, size in zip(inliers, shown, strict=True)],
        [row[:n, :m] for row, n, m in zip(plans, shown, sizes, strict=True)],
    )


def by_centres(molecules: list[Molecule], cues: list[Turned]) -> Outcome:
    """Return the nearest molecules by the same divergence, with means laid on each other and
    nothing turned."""
    held, seen = (
        [replace(each, positions=each.positions - each.positions.mean(0)) for each in some]
        for some in (molecules, cues)
    )
    memory = jdam.store(cloud(held, elements=True), CHAMFER)
    (index, _), seconds = compiled(jdam.nearest, memory, seen)
    return Outcome(np.asarray(index)[:, 0], seconds, [])


def motion(cross: np.ndarray) -> np.ndarray:
    """Return the rotations R of largest ⟨R, H⟩ for matrices H (…, 3, 3)."""
    left, _, right = np.linalg.svd(cross)
    left[..., -1] *= np.sign(np.linalg.det(left @ right))[..., None]
    found: np.ndarray = left @ right
    return found


class Closest:
    """Iterated closest points: partners of least ½|x−y|², with the price of another element; the
    best motion for those nearer than a cap, which falls from the size of the cue to ρ as our ε
    does; from the best four starts of each molecule the same again at ρ; then the capped one-sided
    distance."""

    def __init__(self, molecules: list[Molecule], starts: int):
        sizes = [len(molecule.positions) for molecule in molecules]
        shape = (len(sizes), max(sizes))
        self.points = np.zeros((*shape, 3), np.float32)
        self.numbers = np.zeros(shape, int)
        for row, molecule in enumerate(molecules):
            self.points[row, : sizes[row]] = molecule.positions - molecule.positions.mean(0)
            self.numbers[row, : sizes[row]] = molecule.numbers
        rng = np.random.default_rng(0)
        self.turns = np.stack([rotation(rng) for _ in range(starts)]).astype(np.float32)

    def __call__(self, cue: Cue) -> tuple[int, np.ndarray, np.ndarray]:
        """Return the nearest molecule, its atoms, padded, in the frame of the cue, and which atoms
        of the cue are nearer to it than the cap."""
        y, held = self.points, self.numbers > 0
        centre = cue.positions.mean(0)
        x = (cue.positions - centre).astype(np.float32)
        price = ELEMENT * (cue.numbers[:, None] != self.numbers[:, None])
        price = (price + np.where(held, 0, 1e6)[:, None]).astype(np.float32)
        price = price + 0.5 * (y**2).sum(-1)[:, None]
        row, size = np.arange(len(y))[:, None], (x**2).sum(1).mean()

        def look(turns: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            laid = (x - shift[:, :, None]) @ turns
            costs = price - laid @ np.swapaxes(y, 1, 2)
            costs += 0.5 * (laid**2).sum(-1)[..., None]
            return costs.argmin(-1), costs.min(-1)

        turns = np.repeat(self.turns[:, None], len(y), 1)
        shift = np.zeros(turns.shape[:-1], np.float32)
        for step in range(14):
            partner, cost = look(turns, shift)
            if step == 7:
                best = np.minimum(cost, RHO).mean(-1).argsort(0)[:4, :, None]
                turns, shift, partner, cost = (
                    np.take_along_axis(each, best[..., None] if each is turns else best, 0)
                    for each in (turns, shift, partner, cost)
                )
            weights = (cost < RHO * (size / RHO) ** max(0, 1 - step / 6)) + np.float32(1e-6)
            weights = weights / weights.sum(-1, keepdims=True)
            target = y[row, partner]
            to, back = weights @ x, (weights[..., None, :] @ target)[..., 0, :]
            ways = weights[..., None] * (x - to[:, :, None])
            turns = motion(np.swapaxes(ways, 2, 3) @ (target - back[:, :, None]))
            shift = to - (turns @ back[..., None])[..., 0]
        costs = look(turns, shift)[1]
        scores = np.minimum(costs, RHO).mean(-1)
        at, nearest = np.unravel_index(scores.argmin(), scores.shape)
        laid = y[nearest] @ turns[at, nearest].T + shift[at, nearest] + centre
        return int(nearest), laid, costs[at, nearest] < RHO


def by_closest(molecules: list[Molecule], cues: list[Turned]) -> Outcome:
    """Return what iterated closest points find, in NumPy, on all cores."""
    method, start = Closest(molecules, STARTS), time.perf_counter()
    with ThreadPoolExecutor() as pool:
        nearest, laid, belong = zip(*pool.map(method, cues), strict=True)
    seconds = time.perf_counter() - start
    sizes = [len(molecules[i].positions) for i in nearest]
    wholes = [atoms[:size] for atoms, size in zip(laid, sizes, strict=True)]
    return Outcome(np.array(nearest), seconds, wholes, belong)


def spectrum(atoms: np.ndarray) -> np.ndarray:
    """Return 32 quantiles of the distances between atoms."""
    gaps = np.linalg.norm(atoms[:, None] - atoms[None], axis=-1)
    found: np.ndarray = np.quantile(gaps[np.triu_indices(len(atoms), 1)], np.linspace(0, 1, 32))
    return found


def by_invariants(molecules: list[Molecule], cues: list[Turned]) -> Outcome:
    """Return the molecules of nearest sorted distances and numbers of atoms of each element."""

    def rows(some: list[Any]) -> np.ndarray:
        counts = [np.bincount(each.numbers, minlength=18) for each in some]
        return np.hstack([[spectrum(each.positions) for each in some], counts])

    start = time.perf_counter()
    gaps = np.abs(rows(cues)[:, None] - rows(molecules)[None]).sum(-1)
    return Outcome(gaps.argmin(1), time.perf_counter() - start, [])


OURS, CLOSEST = "jdam.match, Aligned(Chamfer)", f"ICP from {STARTS} starts"
METHODS: dict[str, Method] = {
    OURS: by_memory,
    "jdam.nearest, Chamfer, centred": by_centres,
    CLOSEST: by_closest,
    "sorted distances, element counts": by_invariants,
}


def off(whole: np.ndarray, cue: Turned, molecule: Molecule) -> float:
    """Return the root mean square distance, in Å, from the true atoms in the frame of the cue to
    the nearest of the same element in a right answer. It does not ask which of several like atoms
    is which: of a symmetric molecule nobody can tell."""
    gaps = ((cue.whole[:, None] - whole[None]) ** 2).sum(-1)
    gaps = np.where(molecule.numbers[:, None] == molecule.numbers[None], gaps, np.inf)
    return float(np.sqrt(gaps.min(1).mean()))


def table(molecules: list[Molecule], cues: list[Turned], outcomes: dict[str, Outcome]) -> str:
    """Return right molecules by method and damage, and time; then what else is said of cues."""
    many = len(molecules)
    truth = np.tile(np.arange(many), len(DAMAGES))
    parts = [slice(at, at + many) for at in range(0, len(cues), many)]

    def line(name: str, cells: list[float], form: str = ".0f") -> str:
        return f"{name:36}" + "".join(f"{cell:>16{form}}" for cell in cells)

    def laid(found: Outcome, part: slice) -> float:
        right = np.arange(len(cues))[part][found.nearest[part] == truth[part]]
        if not len(right):
            return np.nan
        return mean_of(lambda i: off(found.atoms[i], cues[i], molecules[truth[i]]), right)

    head = f"{'right molecule, %':36}" + "".join(f"{kind:>16}" for kind in DAMAGES)
    lines, rates = [f"{head}{'ms/cue':>9}", "─" * (len(head) + 9)], {}
    for name, found in outcomes.items():
        rates[name] = [100 * float(np.mean((found.nearest == truth)[part])) for part in parts]
        lines.append(f"{line(name, rates[name])}{1e3 * found.seconds / len(cues):>9.1f}")
    places = [[cue.places for cue in cues[part]] for part in parts]
    shown = [[cue.positions for cue in cues[part]] for part in parts]
    lines += ["", line("atoms of the cue off their place, Å", each(error, shown, places), ".2f")]
    for name, word in ((OURS, "match"), (CLOSEST, "ICP")):
        found = outcomes[name]
        gaps = [laid(found, part) for part in parts]
        lines.append(line(f"{word}: the whole, if right, off, Å", gaps, ".2f"))
        shares = each(told, [found.inliers[part] for part in parts], places)
        lines.append(line(f"{word}: atoms told from strays, %", [100 * share for share in shares]))
    pairs = zip(truth, outcomes[OURS].nearest, strict=True)
    wrong = {f"{molecules[j].name} for {molecules[i].name}" for i, j in pairs if i != j}
    mistaken = f"The memory took {', '.join(sorted(wrong)) or 'no molecule for another'}."
    return "\n".join([*lines, "", *verdict(rates), *wrap(mistaken, len(head) + 9)])


def each(score: Callable[..., float], *lists: list[Any]) -> list[float]:
    """Return the mean score for each damage."""
    return [mean_of(score, *rows) for rows in zip(*lists, strict=True)]


def verdict(rates: dict[str, list[float]]) -> list[str]:
    """Return in words which rivals name as many molecules as the memory, and what it adds."""
    lines = []
    for name, row in rates.items():
        pairs = zip(DAMAGES, row, rates[OURS], strict=True)
        equal = [kind for kind, theirs, ours in pairs if theirs >= ours]
        if name != OURS and equal:
            lines.append(f"The memory is no better than {name} here: {'; '.join(equal)}.")
    return [
        *lines,
        "ICP, written by hand, is the same search: it lays the whole on the cue too, and its cap",
        "tells strays. Sorted distances give a name alone. The memory gives the name, the pose,",
        "and the partner and share of each atom, of all cues in one vmapped call that has",
        "derivatives.",
    ]


#: Which molecule is drawn for which damage: well known ones, in the order of DAMAGES.
DRAWN = dict(zip(DAMAGES, ("CH3CH2OH", "trans-butane", "C5H5N"), strict=True))
TITLES = ["stored", "shown: a cue, turned", "match: which atoms belong"]
TITLES += ["completed, in the cue's frame"]


def draw(path: Path, molecules: list[Molecule], cues: list[Turned], ours: Outcome) -> None:
    """Draw a row for each damage: molecule, cue, which of its atoms belong, and the whole."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (3.1 * len(TITLES), 3.1 * len(DAMAGES) + 0.6)
    figure, axes = plt.subplots(
        len(DAMAGES), len(TITLES), figsize=size, layout="constrained", squeeze=False
    )
    names = [molecule.name for molecule in molecules]
    shown = [names.index(DRAWN[kind]) for kind in DAMAGES]
    for row, (line, kind, i) in enumerate(zip(axes, DAMAGES, shown, strict=True)):
        at = row * len(molecules) + i
        molecule, cue, guess = molecules[i], cues[at], molecules[ours.nearest[at]]
        own, where, whole = flattest(molecule.positions), as_it_lies(cue.whole), ours.atoms[at]
        draw_atoms(line[0], own, molecule.positions, molecule.numbers)
        draw_atoms(line[1], where, cue.positions, cue.numbers, bonds=False)
        draw_links(line[2], where, (cue.positions, whole), ours.plans[at])
        draw_atoms(line[2], where, cue.positions, shares=ours.inliers[at])
        draw_atoms(line[3], where, whole, guess.numbers)
        draw_rings(line[3], where, cue.positions, ours.inliers[at])
        line[0].set_ylabel(kind, fontsize=13)
        line[0].set_xlabel(molecule.name, fontsize=11)
        frame(line[3], guess.name, right=guess is molecule)
        spread = [(molecule.positions, own), (cue.positions, where), (whole, where)]
        reach = max(np.abs((atoms - view[0]) @ view[1]).max() for atoms, view in spread)
        for axis in line:
            window(axis, reach + 0.6)
    key(figure, {int(number) for i in shown for number in molecules[i].numbers})
    caption = "Molecules in any pose: which atoms of a cue belong, and the whole, laid on the cue"
    if any(ours.nearest[row * len(molecules) + i] != i for row, i in enumerate(shown)):
        caption += ". Framed red: another molecule"
    finish(figure, axes, TITLES, caption, path=path, dpi=90)


def run(rng: np.random.Generator, out: Path, tick: Callable[[str], None]) -> str:
    """Draw the figure and return the table; call `tick` before each method."""
    molecules = load_molecules()
    cues = [cue for kind in DAMAGES.values() for cue in turned(molecules, kind, rng)]
    outcomes = {}
    for name, method in METHODS.items():
        tick(f"any pose, {name}")
        outcomes[name] = method(molecules, cues)
    draw(out / "poses.png", molecules, cues, outcomes[OURS])
    head = f"{len(molecules)} molecules, each turned at random and moved, {CHAMFER} in Å"
    return f"{head}\n{table(molecules, cues, outcomes)}\nfigure: {out / 'poses.png'}"
