"""Recall molecules, stored as point clouds, from parts of them, amid clutter, in any order.

Each molecule of the G2 set that comes with ASE (L. A. Curtiss et al. 1997; A. H. Larsen et al.
2017) is the cloud of its atoms, in Å, with the elements as features. The cues are some of these
atoms, jittered and shuffled, with strays among them. Beside `jdam.Chamfer`: unbalanced transport,
and what one would try first, Chamfer distances in a line of NumPy and a Hopfield memory of sorted
coordinates. A one-sided distance with a cap names molecules as well as ours. What a memory adds is
which atoms belong to what, where they belong, and the whole, for many cues in one `vmap`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jdam
from jdam.demo import finish
from jdam.demo._drawing import draw_atoms, draw_links, flattest, frame, window

SMALLEST = 8  # atoms of a molecule
EPSILON, RHO, ELEMENT = 0.02, 0.1, 0.1  # Å²; the last is the price of another element
JITTER, STRAYS = 0.1, 3  # Å; atoms that do not belong
CHAMFER = jdam.Chamfer(EPSILON, rho=RHO, feature_scale=ELEMENT)


@dataclass(frozen=True)
class Molecule:
    """Its name, where its atoms are, (n, 3) in Å, and which elements they are, (n,)."""

    name: str
    positions: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True)
class Cue:
    """Atoms as they are shown, where they belong, which of strays is NaN, and their elements."""

    positions: np.ndarray
    places: np.ndarray
    numbers: np.ndarray


def load_molecules() -> list[Molecule]:
    """Those of the G2 set with `SMALLEST` atoms and more."""
    from ase.collections import g2

    found = [Molecule(name, g2[name].positions, g2[name].numbers) for name in g2.names]
    return [molecule for molecule in found if len(molecule.positions) >= SMALLEST]


def cut(atoms: np.ndarray, rng: np.random.Generator, share: float = 0.6) -> np.ndarray:
    """Which atoms lie farthest in a random direction, 60 % of them: their indices."""
    along = atoms @ rng.normal(size=3)
    found: np.ndarray = np.sort(np.argsort(along)[: round(share * len(atoms))])
    return found


#: What share of the atoms is left, and how many strays are added.
DAMAGES: dict[str, tuple[float, int]] = {
    "60 % of atoms": (0.6, 0),
    "40 % of atoms": (0.4, 0),
    "3 strays": (1.0, STRAYS),
    "60 %, 3 strays": (0.6, STRAYS),
}


def damage(
    molecules: list[Molecule], kind: tuple[float, int], rng: np.random.Generator
) -> list[Cue]:
    """A cue for each molecule, of which a share is left, with strays. These are anywhere in a box
    2 Å wider than what is left, of elements that the molecule has."""
    share, strays = kind
    cues = []
    for molecule in molecules:
        kept = cut(molecule.positions, rng, share)
        atoms = molecule.positions[kept]
        stray = rng.uniform(atoms.min(0) - 1, atoms.max(0) + 1, (strays, 3))
        shown = np.concatenate([atoms, stray])
        places = np.concatenate([atoms, np.full((strays, 3), np.nan)])
        elements = np.append(molecule.numbers[kept], rng.choice(molecule.numbers, strays))
        order = rng.permutation(len(shown))
        shown = shown + rng.normal(0, JITTER, shown.shape)
        cues.append(Cue(shown[order], places[order], elements[order]))
    return cues


def clouds(atoms: list[np.ndarray], numbers: list[np.ndarray] | None = None) -> jdam.PointCloud:
    """Atoms (n, 3) of any numbers as uniform clouds of one batch, with elements as features."""
    points = [positions.astype(np.float32) for positions in atoms]
    kinds = np.arange(1, 18)
    features = None if numbers is None else [one[:, None] == kinds for one in numbers]
    return jdam.PointCloud.from_ragged(points, features=features)


@dataclass
class Outcome:
    """What a method made of the cues: which molecules, and the atoms (n, 3) of each answer."""

    nearest: np.ndarray
    seconds: float
    atoms: list[np.ndarray]
    inliers: Sequence[np.ndarray] = ()
    plans: Sequence[np.ndarray] = ()
    recalled: Sequence[np.ndarray] = ()
    found: np.ndarray | None = None  # which molecules recall ends at


#: From the stored molecules to a function of cues.
Method = Callable[[list[Molecule]], Callable[[list[Cue]], Outcome]]


def cloud(some: list[Any], *, elements: bool) -> jdam.PointCloud:
    """Molecules or cues as clouds, with or without their elements."""
    numbers = [each.numbers for each in some] if elements else None
    return clouds([each.positions for each in some], numbers)


def by_nearest(geometry: jdam.Geometry) -> Method:
    """The nearest molecule, elements untold."""
    batch = jax.jit(jax.vmap(jdam.nearest, (None, 0)))

    def of(molecules: list[Molecule]) -> Any:
        memory = jdam.store(cloud(molecules, elements=False), geometry)

        def run(cues: list[Cue]) -> Outcome:
            seen = cloud(cues, elements=False).pad(memory.patterns.num_atoms + STRAYS)
            (index, _), seconds = timed(batch, memory, seen)
            nearest = np.asarray(index)[:, 0]
            return Outcome(nearest, seconds, [molecules[i].positions for i in nearest])

        return run

    return of


def by_memory(molecules: list[Molecule]) -> Any:
    """All that a memory of clouds with elements has to say: which atoms belong to what, by `match`;
    where they belong, by `recall`; and what the whole is, by `attend`."""
    memory = jdam.store(cloud(molecules, elements=True), CHAMFER)
    beta = jdam.suggest_beta(memory)

    def ask(memory: jdam.Memory, cue: jdam.PointCloud, beta: jax.Array) -> Any:
        whole = jdam.attend(memory, cue, beta, values=memory)
        return jdam.match(memory, cue), jdam.recall(memory, cue, beta), whole

    batch = jax.jit(jax.vmap(ask, (None, 0, None)))

    def run(cues: list[Cue]) -> Outcome:
        seen = cloud(cues, elements=True).pad(memory.patterns.num_atoms + STRAYS)
        (matched, result, whole), seconds = timed(batch, memory, seen, beta)
        sizes = [len(cue.positions) for cue in cues]

        def rows(array: jax.Array) -> list[np.ndarray]:
            return [row[:size] for row, size in zip(np.asarray(array), sizes, strict=True)]

        points, on = np.asarray(whole.points), np.asarray(whole.weights) > 0
        return Outcome(
            np.asarray(matched.index),
            seconds,
            [atoms[held] for atoms, held in zip(points, on, strict=True)],
            rows(matched.inliers),
            rows(matched.plan),
            rows(result.measure.points),
            np.asarray(result.nearest),
        )

    return run


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The result of a jitted function, and the seconds that it takes once compiled."""
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    found = jax.block_until_ready(function(*args))
    return found, time.perf_counter() - start


def by_chamfer(cap: float, *, elements: bool = False, both: bool = False) -> Method:
    """The molecule of least Chamfer distance, in NumPy: the mean over the cue's atoms of ½|x−y|² to
    the molecule's nearest atom y, at most `cap`; with the price of another element; and from the
    molecule to the cue too."""

    def distance(cue: Cue, molecule: Molecule) -> float:
        cost = 0.5 * ((cue.positions[:, None] - molecule.positions[None]) ** 2).sum(-1)
        cost = cost + ELEMENT * elements * (cue.numbers[:, None] != molecule.numbers[None])
        back = np.minimum(cost.min(0), cap).mean() if both else 0.0
        return float(np.minimum(cost.min(1), cap).mean() + back)

    def of(molecules: list[Molecule]) -> Any:
        def run(cues: list[Cue]) -> Outcome:
            start = time.perf_counter()
            nearest = np.array([np.argmin([distance(c, m) for m in molecules]) for c in cues])
            seconds = time.perf_counter() - start
            return Outcome(nearest, seconds, [molecules[i].positions for i in nearest])

        return run

    return of


def hopfield(molecules: list[Molecule]) -> Any:
    """A Hopfield memory of sorted coordinates, padded with zeros."""
    sizes = [len(molecule.positions) for molecule in molecules]
    most = max(sizes) + STRAYS

    def flatten(some: list[Any]) -> np.ndarray:
        rows = np.zeros((len(some), most, 3), np.float32)
        for row, each in zip(rows, some, strict=True):
            row[: len(each.positions)] = each.positions[np.lexsort(each.positions.T[::-1])]
        return rows.reshape(len(some), -1)

    # Of squared distances, since molecules have coordinates of different sizes.
    memory = jdam.store(flatten(molecules))
    beta = jdam.suggest_beta(memory)
    recall = jax.jit(jax.vmap(jdam.recall, (None, 0, None)))

    def run(cues: list[Cue]) -> Outcome:
        result, seconds = timed(recall, memory, flatten(cues), beta)
        nearest = np.asarray(result.nearest)
        rows = np.asarray(result.measure).reshape(-1, most, 3)
        atoms = [row[: sizes[i]] for row, i in zip(rows, nearest, strict=True)]
        return Outcome(nearest, seconds, atoms)

    return run


OURS = "jdam.Chamfer with ρ, elements"
METHODS: dict[str, Method] = {
    OURS: by_memory,
    "jdam.Chamfer with ρ": by_nearest(CHAMFER),
    "jdam.Sinkhorn with ρ": by_nearest(jdam.Sinkhorn(0.05, rho=RHO, tol=1e-4)),
    "NumPy, one-sided, capped, elements": by_chamfer(RHO, elements=True),
    "NumPy, one-sided, capped": by_chamfer(RHO),
    "NumPy, two-sided Chamfer": by_chamfer(np.inf, both=True),
    "Hopfield, sorted and padded": hopfield,
}


def error(atoms: np.ndarray, places: np.ndarray) -> float:
    """The root mean square distance of atoms to where they belong, in Å, without strays."""
    return float(np.sqrt(np.nanmean(((atoms - places) ** 2).sum(-1))))


def told(inliers: np.ndarray, places: np.ndarray) -> float:
    """The share of the atoms that are told to belong or to be strays, as they are."""
    return float(np.mean((inliers > 0.5) == ~np.isnan(places[:, 0])))


def mean_of(score: Callable[..., float], *lists: Any) -> float:
    """The mean score of the entries of some lists."""
    return float(np.mean([score(*row) for row in zip(*lists, strict=True)]))


def table(
    molecules: list[Molecule],
    cues: dict[str, list[Cue]],
    outcomes: dict[tuple[str, str], Outcome],
) -> str:
    """Right molecules by method and damage, and time; then what else our memory says."""
    truth = np.arange(len(molecules))

    def line(name: str, cells: list[float], form: str = ".0f") -> str:
        return f"{name:36}" + "".join(f"{cell:>16{form}}" for cell in cells)

    head = f"{'right molecule, %':36}" + "".join(f"{damage:>16}" for damage in DAMAGES)
    lines = [f"{head}{'ms/cue':>9}", "─" * (len(head) + 9)]
    for name in METHODS:
        row = [outcomes[name, damage] for damage in DAMAGES]
        rates = [100 * float(np.mean(found.nearest == truth)) for found in row]
        taken = 1e3 * np.mean([found.seconds for found in row]) / len(molecules)
        lines.append(f"{line(name, rates)}{taken:>9.2f}")
    lines += [
        "",
        "beside the name, which a line of NumPy finds about as often: match, recall, attend",
    ]
    right, known, shown, recalled = [], [], [], []
    for damage in DAMAGES:
        found, seen = outcomes[OURS, damage], [cue.places for cue in cues[damage]]
        right.append(100 * float(np.mean(found.found == truth)))
        known.append(100 * mean_of(told, found.inliers, seen))
        shown.append(mean_of(error, [cue.positions for cue in cues[damage]], seen))
        recalled.append(mean_of(error, found.recalled, seen))
    lines.append(line("at the right molecule's atoms, %", right))
    lines.append(line("atoms told from strays, %", known))
    lines.append(line("atoms off their place, shown, Å", shown, ".2f"))
    lines.append(line("atoms off their place, recalled, Å", recalled, ".2f"))
    return "\n".join(lines)


#: Which molecule is drawn for which damage.
DRAWN = dict(zip(DAMAGES, ("C6H6", "trans-butane", "C5H5N", "C5H8"), strict=True))


def draw(
    path: Path,
    molecules: list[Molecule],
    cues: dict[str, list[Cue]],
    outcomes: dict[tuple[str, str], Outcome],
) -> None:
    """A row for each damage: the molecule, the cue, what our memory makes of it, and a rival."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rival = "Hopfield, sorted and padded"
    titles = ["stored", "shown: a cue", "match: which atoms belong", "recall: denoised"]
    titles += ["attend: completed", "Hopfield, sorted"]
    size = (2.6 * len(titles), 2.6 * len(DAMAGES) + 0.6)
    figure, axes = plt.subplots(
        len(DAMAGES), len(titles), figsize=size, layout="constrained", squeeze=False
    )
    names = [molecule.name for molecule in molecules]
    for line, damage in zip(axes, DAMAGES, strict=True):
        i = names.index(DRAWN[damage])
        molecule, cue, found = molecules[i], cues[damage][i], outcomes[OURS, damage]
        where = flattest(molecule.positions)
        draw_atoms(line[0], where, molecule.positions, molecule.numbers)
        draw_atoms(line[1], where, cue.positions)
        answer = molecules[found.nearest[i]].positions
        draw_links(line[2], where, (cue.positions, answer), found.plans[i])
        draw_atoms(line[2], where, cue.positions, shares=found.inliers[i])
        draw_atoms(line[3], where, found.recalled[i], shares=found.inliers[i])
        for axis, name in zip(line[4:], (OURS, rival), strict=True):
            seen = outcomes[name, damage]
            guess = molecules[seen.nearest[i]]
            draw_atoms(axis, where, seen.atoms[i], guess.numbers if name == OURS else None)
            frame(axis, guess.name, right=seen.nearest[i] == i)
        line[0].set_ylabel(damage, fontsize=13)
        line[0].set_xlabel(molecule.name, fontsize=11)
        reach = max(np.abs((cue.positions - where[0]) @ where[1]).max() + 1, 3.2)
        for axis in line:
            window(axis, reach)
    caption = (
        "A molecule from damaged cues: which atoms belong (blue), to what, and what the whole "
    )
    caption += "is. Framed red: another molecule."
    finish(figure, axes, titles, caption, path=path, dpi=90)


def run(rng: np.random.Generator, out: Path, tick: Callable[[str], None]) -> str:
    """Draws the figure and returns the table; calls `tick` before each recall."""
    molecules = load_molecules()
    methods = {name: method(molecules) for name, method in METHODS.items()}
    outcomes, cues = {}, {}
    for name in DAMAGES:
        cues[name] = damage(molecules, DAMAGES[name], rng)
        for method, recall in methods.items():
            tick(f"{name}, {method}")
            outcomes[method, name] = recall(cues[name])
    draw(out / "molecules.png", molecules, cues, outcomes)
    head = f"{len(molecules)} molecules of {SMALLEST} and more atoms in any order, {CHAMFER} in Å"
    return f"{head}\n{table(molecules, cues, outcomes)}\nfigure: {out / 'molecules.png'}"
