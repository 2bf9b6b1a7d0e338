"""Recall molecules, stored as point clouds, from parts of them, amid clutter, in any order.

Each molecule of the G2 set that comes with ASE (L. A. Curtiss et al. 1997; A. H. Larsen et al.
2017) is the cloud of its atoms, in Å. The cues are some of these atoms, jittered, with strays among
them. Beside unbalanced and balanced transport: what one would do without, a Hopfield memory of
padded or sorted coordinates, and the nearest neighbour by Chamfer distance.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdam
from jdam.demo import finish, spacing

SMALLEST = 8  # atoms of a molecule
EPSILON, RHO, KAPPA = 0.05, 0.1, 20.0  # Å², Å², 1/Å²
JITTER, STRAYS = 0.1, 3  # Å; atoms that do not belong


@dataclass(frozen=True)
class Molecule:
    """Its name, where its atoms are, (n, 3) in Å, and which elements they are, (n,)."""

    name: str
    positions: np.ndarray
    numbers: np.ndarray


def load_molecules() -> list[Molecule]:
    """Those of the G2 set with `SMALLEST` atoms and more."""
    from ase.collections import g2

    found = [Molecule(name, g2[name].positions, g2[name].numbers) for name in g2.names]
    return [molecule for molecule in found if len(molecule.positions) >= SMALLEST]


def cut(atoms: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The 60 % of the atoms that lie farthest in a random direction."""
    along = atoms @ rng.normal(size=3)
    return atoms[np.sort(np.argsort(along)[: round(0.6 * len(atoms))])]


def clutter(atoms: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All atoms and three strays, anywhere in a box 2 Å wider than the molecule."""
    strays = rng.uniform(atoms.min(0) - 1, atoms.max(0) + 1, (STRAYS, 3))
    return np.concatenate([atoms, strays])


def shuffle(atoms: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All atoms in another order."""
    return rng.permutation(atoms)


def all_of_it(atoms: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A part, with strays, in another order."""
    return shuffle(clutter(cut(atoms, rng), rng), rng)


DAMAGES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "60 % of atoms": cut,
    "3 strays": clutter,
    "shuffled": shuffle,
    "all three": all_of_it,
}


def damage(
    molecules: list[Molecule], name: str, rng: np.random.Generator
) -> tuple[list[np.ndarray], jdam.PointCloud]:
    """A cue for each molecule: its atoms, and all of them as clouds of one size."""
    cues = []
    for molecule in molecules:
        atoms = DAMAGES[name](molecule.positions, rng)
        cues.append(atoms + rng.normal(0, JITTER, atoms.shape))
    most = max(len(molecule.positions) for molecule in molecules) + STRAYS
    return cues, clouds(cues).pad(most)


def clouds(atoms: list[np.ndarray]) -> jdam.PointCloud:
    """Atoms (n, 3) of any numbers as uniform clouds of one batch."""
    return jdam.PointCloud.from_ragged([points.astype(np.float32) for points in atoms])


@dataclass
class Outcome:
    """What a method made of the cues: which molecule, its atoms (M, n, 3), which of these count."""

    nearest: np.ndarray
    atoms: np.ndarray
    on: np.ndarray
    seconds: float
    inliers: np.ndarray | None = None


#: From the stored molecules and β to a function of cues, as atoms and as clouds.
Method = Callable[[list[Molecule], float], Callable[[list[np.ndarray], jdam.PointCloud], Outcome]]


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The result of a jitted function, and the seconds that it takes once compiled."""
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    found = jax.block_until_ready(function(*args))
    return found, time.perf_counter() - start


def transport(rho: float | None) -> Method:
    """Address by a memory of clouds, and read the molecule by `attend`."""

    def of(molecules: list[Molecule], beta: float) -> Any:
        stored = clouds([molecule.positions for molecule in molecules])
        geometry = jdam.Sinkhorn(EPSILON, rho=rho, hellinger_scale=KAPPA if rho else 0, tol=1e-4)
        memory = jdam.store(stored, geometry)
        scaled = beta / spacing(memory)

        def complete(memory: jdam.Memory, cue: jdam.PointCloud) -> Any:
            result = jdam.recall(memory, cue, scaled, max_steps=1)
            return result, jdam.attend(memory, cue, scaled, values=memory)

        batch = jax.jit(jax.vmap(complete, (None, 0)))

        def run(cues: list[np.ndarray], seen: jdam.PointCloud) -> Outcome:
            found, seconds = timed(batch, memory, seen)
            result, whole = found
            inliers = None if rho is None else np.asarray(result.inliers)
            points, on = np.asarray(whole.points), np.asarray(whole.weights) > 0
            return Outcome(np.asarray(result.nearest), points, on, seconds, inliers)

        return run

    return of


def hopfield(order: Callable[[np.ndarray], np.ndarray]) -> Method:
    """A Hopfield memory of coordinates in some order, padded with zeros."""

    def of(molecules: list[Molecule], beta: float) -> Any:
        sizes = np.array([len(molecule.positions) for molecule in molecules])
        most = sizes.max() + STRAYS

        def flatten(atoms: list[np.ndarray]) -> np.ndarray:
            rows = np.zeros((len(atoms), most, 3), np.float32)
            for row, points in zip(rows, atoms, strict=True):
                row[: len(points)] = order(points)
            return rows.reshape(len(atoms), -1)

        # Of squared distances, since molecules have coordinates of different sizes.
        memory = jdam.store(flatten([molecule.positions for molecule in molecules]))
        scaled = beta / spacing(memory)
        recall = jax.jit(jax.vmap(lambda memory, cue: jdam.recall(memory, cue, scaled), (None, 0)))

        def run(cues: list[np.ndarray], _: jdam.PointCloud) -> Outcome:
            result, seconds = timed(recall, memory, flatten(cues))
            nearest = np.asarray(result.nearest)
            atoms = np.asarray(result.measure).reshape(-1, most, 3)
            return Outcome(nearest, atoms, np.arange(most) < sizes[nearest, None], seconds)

        return run

    return of


def chamfer(molecules: list[Molecule], beta: float) -> Any:
    """The molecule of least Σ over atoms of either of the squared distance to the other's nearest,
    both sums divided by their numbers."""
    stored = clouds([molecule.positions for molecule in molecules])

    def distances(stored: jdam.PointCloud, cue: jdam.PointCloud) -> jax.Array:
        gaps = jnp.sum((cue.points[None, :, None] - stored.points[:, None]) ** 2, -1)
        here, there = cue.weights > 0, stored.weights > 0
        forth = jnp.where(there[:, None], gaps, jnp.inf).min(2) @ cue.weights
        back = jnp.where(here[None, :, None], gaps, jnp.inf).min(1)
        return forth + jnp.vecdot(back, stored.weights)

    batch = jax.jit(jax.vmap(distances, (None, 0)))

    def run(cues: list[np.ndarray], seen: jdam.PointCloud) -> Outcome:
        found, seconds = timed(batch, stored, seen)
        nearest = np.asarray(found).argmin(1)
        points, on = np.asarray(stored.points), np.asarray(stored.weights) > 0
        return Outcome(nearest, points[nearest], on[nearest], seconds)

    return run


METHODS: dict[str, Method] = {
    f"unbalanced transport, ρ = {RHO:g} Å²": transport(RHO),
    "balanced transport": transport(None),
    "Chamfer, nearest neighbour": chamfer,
    "Hopfield, coordinates padded": hopfield(lambda atoms: atoms),
    "Hopfield, sorted and padded": hopfield(lambda atoms: atoms[np.lexsort(atoms.T[::-1])]),
}


def error(molecule: Molecule, atoms: np.ndarray) -> float:
    """The root mean square distance of the molecule's atoms to the nearest of some atoms, in Å."""
    gaps = ((molecule.positions[:, None] - atoms[None]) ** 2).sum(-1)
    return float(np.sqrt(gaps.min(1).mean()))


def table(molecules: list[Molecule], outcomes: dict[tuple[str, str], Outcome]) -> str:
    """A line for each method: right molecules by damage, error of the atoms, time."""
    head = f"{'right molecule, %':36}" + "".join(f"{damage:>15}" for damage in DAMAGES)
    head += f"{'Å to truth':>13}{'ms/cue':>9}"
    lines = [head, "─" * len(head)]
    for name in METHODS:
        row = [outcomes[name, damage] for damage in DAMAGES]
        rates = [100 * np.mean(found.nearest == np.arange(len(molecules))) for found in row]
        errors = [
            error(molecule, found.atoms[i][found.on[i]])
            for found in row
            for i, molecule in enumerate(molecules)
        ]
        taken = 1e3 * np.mean([found.seconds for found in row]) / len(molecules)
        cells = "".join(f"{rate:>15.0f}" for rate in rates)
        lines.append(f"{name:36}{cells}{np.mean(errors):>13.2f}{taken:>9.2f}")
    return "\n".join(lines)


#: Which molecule is drawn for which damage.
DRAWN = {
    "60 % of atoms": "C6H6",
    "3 strays": "C5H5N",
    "shuffled": "trans-butane",
    "all three": "C5H8",
}
COLOURS = {1: "#c8c8c8", 6: "#404040", 7: "#0072b2", 8: "#d55e00", 9: "#009e73"}


def draw(
    path: Path,
    molecules: list[Molecule],
    cues: dict[str, list[np.ndarray]],
    outcomes: dict[tuple[str, str], Outcome],
) -> None:
    """A row for each damage: the molecule, the cue, what each method completes it to."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    unbalanced, balanced, *_, sort = METHODS
    titles = ["stored", "shown: a cue", "which atoms belong", "completed: unbalanced"]
    titles += ["balanced transport", "Hopfield, sorted"]
    size = (2.6 * len(titles), 2.6 * len(DAMAGES) + 0.6)
    figure, axes = plt.subplots(
        len(DAMAGES), len(titles), figsize=size, layout="constrained", squeeze=False
    )
    names = [molecule.name for molecule in molecules]
    for line, damage in zip(axes, DAMAGES, strict=True):
        i = names.index(DRAWN[damage])
        molecule, cue, found = molecules[i], cues[damage][i], outcomes[unbalanced, damage]
        assert found.inliers is not None
        view = np.linalg.svd(molecule.positions - molecule.positions.mean(0))[2][:2].T
        where = (molecule.positions.mean(0), view)
        _atoms(line[0], where, molecule.positions, molecule.numbers)
        _atoms(line[1], where, cue)
        _atoms(line[2], where, cue, shares=found.inliers[i, : len(cue)])
        for axis, name in zip(line[3:], (unbalanced, balanced, sort), strict=True):
            seen = outcomes[name, damage]
            guess = molecules[seen.nearest[i]]
            ordered = guess.numbers if name != sort else None
            _atoms(axis, where, seen.atoms[i][seen.on[i]], ordered)
            right = seen.nearest[i] == i
            axis.spines[:].set(color="#009e73" if right else "#ff2d55", linewidth=2.5)
            axis.set_xlabel(guess.name, fontsize=11)
        line[0].set_ylabel(damage, fontsize=13)
        line[0].set_xlabel(molecule.name, fontsize=11)
        reach = max(np.abs((cue - where[0]) @ view).max() + 1, 3.2)
        for axis in line:
            axis.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[])
            axis.set_aspect("equal")
    caption = "A molecule from damaged cues: unbalanced transport tells which atoms belong, and to "
    caption += "what. Framed red: another molecule."
    finish(figure, axes, titles, caption, path=path, dpi=90)


def _atoms(
    axis: Any,
    where: tuple[np.ndarray, np.ndarray],
    atoms: np.ndarray,
    numbers: np.ndarray | None = None,
    shares: np.ndarray | None = None,
) -> None:
    """Atoms seen from the molecule's flattest side: with bonds where their elements are known, and
    from red, for shares up to 0.05, to blue, from 0.35 on."""
    from matplotlib.colors import LinearSegmentedColormap

    flat = (atoms - where[0]) @ where[1]
    if numbers is None:
        ramp = LinearSegmentedColormap.from_list("belongs", ["#ff2d55", "#0072b2"])
        colours = "#777777" if shares is None else ramp((shares - 0.05) / 0.3)
        axis.scatter(*flat.T, s=170, c=colours, zorder=2)
        return
    from ase.data import covalent_radii

    reach = 1.25 * (covalent_radii[numbers][:, None] + covalent_radii[numbers][None])
    gaps = np.linalg.norm(atoms[:, None] - atoms[None], axis=-1)
    for j, k in zip(*np.nonzero(np.triu(gaps < reach, 1)), strict=True):
        axis.plot(*flat[[j, k]].T, color="#999999", linewidth=3, zorder=1)
    elements = [COLOURS.get(int(number), "#cc79a7") for number in numbers]
    sizes = 90 + 420 * covalent_radii[numbers] ** 2
    axis.scatter(*flat.T, s=sizes, c=elements, edgecolors="#404040", linewidths=0.6, zorder=2)


def run(rng: np.random.Generator, beta: float, out: Path, tick: Callable[[str], None]) -> str:
    """Draws the figure and returns the table; calls `tick` before each recall."""
    molecules = load_molecules()
    methods = {name: method(molecules, beta) for name, method in METHODS.items()}
    outcomes, cues = {}, {}
    for name in DAMAGES:
        cues[name], seen = damage(molecules, name, rng)
        for method, recall in methods.items():
            tick(f"{name}, {method}")
            outcomes[method, name] = recall(cues[name], seen)
    draw(out / "molecules.png", molecules, cues, outcomes)
    head = f"{len(molecules)} molecules of {SMALLEST} and more atoms, Sinkhorn(ε = {EPSILON:g} Å²)"
    return f"{head}\n{table(molecules, outcomes)}\nfigure: {out / 'molecules.png'}"
