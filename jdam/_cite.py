"""BibTeX entries of the papers on which geometries, separations, adjoints and accelerations are
based."""

from typing import Any

from jdam._energy.separation import Entmax, Epanechnikov
from jdam._memory.memory import Memory, check_memory
from jdam._recall.acceleration import Anderson, TrustRegion
from jdam._recall.adjoint import OneStep
from jdam.geometry import (
    Aligned,
    Bures,
    DotProduct,
    EntropicBures,
    Euclidean,
    MixtureWasserstein,
    Sinkhorn,
)

#: {key: (authors, title, journal, year)}.
PAPERS = {
    "tankala2025dense": (
        "Tankala, Chandan and Balasubramanian, Krishnakumar",
        "Dense Associative Memory on the {Bures-Wasserstein} Space",
        "arXiv:2509.23162",
        2025,
    ),
    "mustafi2026sinkhorn": (
        "Mustafi, Aratrika and Mukherjee, Soumya",
        "Sinkhorn Based Associative Memory Retrieval Using Spherical {Hellinger Kantorovich} "
        "Dynamics",
        "arXiv:2603.20656",
        2026,
    ),
    "ramsauer2020hopfield": (
        "Ramsauer, Hubert and others",
        "Hopfield Networks is All You Need",
        "arXiv:2008.02217",
        2020,
    ),
    "sejourne2019sinkhorn": (
        "Séjourné, Thibault and Feydy, Jean and Vialard, François-Xavier and Trouvé, Alain and "
        "Peyré, Gabriel",
        "Sinkhorn Divergences for Unbalanced Optimal Transport",
        "arXiv:1910.12958",
        2019,
    ),
    "delon2019wasserstein": (
        "Delon, Julie and Desolneux, Agnès",
        "A {Wasserstein}-type Distance in the Space of {Gaussian} Mixture Models",
        "arXiv:1907.05254",
        2019,
    ),
    "janati2020entropic": (
        "Janati, Hicham and Muzellec, Boris and Peyré, Gabriel and Cuturi, Marco",
        "Entropic Optimal Transport between Unbalanced {Gaussian} Measures has a Closed Form",
        "arXiv:2006.02572",
        2020,
    ),
    "peters2019sparse": (
        "Peters, Ben and Niculae, Vlad and Martins, André F. T.",
        "Sparse Sequence-to-Sequence Models",
        "arXiv:1905.05702",
        2019,
    ),
    "hoover2025dense": (
        "Hoover, Benjamin and others",
        "Dense Associative Memory with {Epanechnikov} Energy",
        "arXiv:2506.10801",
        2025,
    ),
    "bolte2023onestep": (
        "Bolte, Jérôme and Pauwels, Edouard and Vaiter, Samuel",
        "One-step Differentiation of Iterative Algorithms",
        "arXiv:2305.13768",
        2023,
    ),
    "anderson1965iterative": (
        "Anderson, Donald G.",
        "Iterative Procedures for Nonlinear Integral Equations",
        "Journal of the ACM 12(4), 547–560",
        1965,
    ),
    "steihaug1983conjugate": (
        "Steihaug, Trond",
        "The Conjugate Gradient Method and Trust Regions in Large Scale Optimization",
        "SIAM Journal on Numerical Analysis 20(3), 626–637",
        1983,
    ),
}
#: The keys of the papers on which each class is based.
BEHIND: dict[type, tuple[str, ...]] = {
    Bures: ("tankala2025dense",),
    EntropicBures: ("tankala2025dense", "janati2020entropic"),
    MixtureWasserstein: ("tankala2025dense", "delon2019wasserstein"),
    Sinkhorn: ("mustafi2026sinkhorn",),
    Euclidean: ("ramsauer2020hopfield",),
    DotProduct: ("ramsauer2020hopfield",),
    Entmax: ("peters2019sparse",),
    Epanechnikov: ("hoover2025dense",),
    OneStep: ("bolte2023onestep",),
    Anderson: ("anderson1965iterative",),
    TrustRegion: ("steihaug1983conjugate",),
}


def cite(memory: Memory, *used: Any) -> str:
    """BibTeX entries of the papers on which a memory and a recall from it are based.

    **Arguments:**

    - `memory`: the memory, for the papers of its geometry.
    - `used`: separations, adjoints and accelerations, as in
      `jdam.cite(memory, jdam.Entmax(2.0))`.

    **Returns:** the entries, separated by blank lines.

    **Raises:** `TypeError` if `memory` is not a memory.
    """
    check_memory(memory)
    geometry = memory.geometry
    if isinstance(geometry, Aligned):
        geometry = geometry.geometry
    keys = [key for part in (geometry, *used) for key in BEHIND.get(type(part), ())]
    if getattr(geometry, "rho", None) is not None:
        keys.append("sejourne2019sinkhorn")
    return "\n\n".join(_entry(key) for key in dict.fromkeys(keys))


def _entry(key: str) -> str:
    """The BibTeX entry of one of the `PAPERS`."""
    author, title, journal, year = PAPERS[key]
    fields = {"title": title, "author": author, "journal": journal, "year": year}
    lines = [f"  {name:7} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@article{{{key},", *lines, "}"])
