"""The matplotlib code of `jdam.plot`: axes, colours and collections.

Matplotlib is an optional dependency, and imported inside functions only.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Number of colours of a property cycle that are drawn before they repeat: a multiple of the usual
#: lengths of cycles.
COLOURS = 60


def axes(ax: "Axes | None") -> "Axes":
    """Return `ax`, or the current axes if None."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("jdam.plot needs matplotlib: pip install 'jdam[plot]'") from error
    return plt.gca() if ax is None else ax


def labelled(ax: "Axes", names: tuple[str, str]) -> "Axes":
    """Label the axes that have no label, and return them."""
    if not ax.get_xlabel():
        ax.set_xlabel(names[0])
    if not ax.get_ylabel():
        ax.set_ylabel(names[1])
    return ax


def next_colours(ax: "Axes", num: int, *, filled: bool = False) -> np.ndarray:
    """Return the next colours (num, 4) of the property cycle of lines, or of filled patches."""
    from matplotlib.colors import to_rgba_array

    artists: list[Any] = []
    # Matplotlib has no public function for the next colour, so empty artists are drawn and removed.
    for _ in range(min(num, COLOURS)):
        artists += ax.fill([], []) if filled else ax.plot([], [])
    colours = [artist.get_facecolor() if filled else artist.get_color() for artist in artists]
    for artist in artists:
        artist.remove()
    return np.resize(to_rgba_array(colours), (num, 4))


def colours_of(ax: "Axes", features: np.ndarray) -> np.ndarray:
    """Return colours (M, 4) of atoms by their features (…, k). For k > 1 the index of the largest
    feature, as of a one-hot label, selects a colour of the property cycle; a single feature selects
    one of the colour map.
    """
    from matplotlib import colormaps, rcParams
    from matplotlib.colors import Normalize

    rows = features.reshape(-1, features.shape[-1])
    if rows.shape[1] > 1:
        colours: np.ndarray = next_colours(ax, rows.shape[1], filled=True)[rows.argmax(1)]
        return colours
    shades = Normalize()(rows[:, 0]).filled()
    return np.asarray(colormaps[rcParams["image.cmap"]](shades))


def styled(style: dict[str, Any], artist: type, **default: Any) -> dict[str, Any]:
    """Return the `default` style with the entries of `style`, whose aliases, as lw, are spelled
    out.
    """
    from matplotlib.cbook import normalize_kwargs

    return default | normalize_kwargs(style, artist)


def faded(colours: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the colours (N·K, 4) of components: those of their mixtures, more transparent for
    smaller weights (…, K).
    """
    from matplotlib.colors import to_rgba_array

    opacities = np.sqrt(weights / weights.max(-1, keepdims=True)).reshape(-1, weights.shape[-1])
    result: np.ndarray = np.resize(to_rgba_array(colours), (len(opacities), 4))
    result = result.repeat(opacities.shape[1], axis=0)
    result[:, 3] *= opacities.ravel()
    return result


def dots(ax: "Axes", outlines: np.ndarray, colours: np.ndarray) -> None:
    """Draw a dot for each outline that is a single point, which a polygon would not show."""
    from matplotlib.colors import to_rgba_array

    points = np.flatnonzero(np.ptp(outlines, axis=1).max(-1) == 0)
    if points.size:
        colours = np.resize(to_rgba_array(colours), (len(outlines), 4))
        xs, ys = outlines[points, 0].T
        ax.scatter(xs, ys, s=16, c=colours[points], zorder=2)


def contours(
    ax: "Axes", xs: np.ndarray, ys: np.ndarray, energies: np.ndarray, style: dict[str, Any]
) -> None:
    """Draw filled contours of energies (len(ys), len(xs)), with denser levels near the minimum."""
    from matplotlib.colors import PowerNorm

    low, high = energies.min(), energies.max()
    levels = low + (high - low) * np.linspace(0, 1, 25) ** 2
    ax.contourf(xs, ys, energies, **{"norm": PowerNorm(0.5, low, high), "levels": levels} | style)


def atom_paths(ax: "Axes", points: np.ndarray, weights: np.ndarray, style: dict[str, Any]) -> Any:
    """Draw the paths of atoms through the stages (T, n, 2) of a cloud, more opaque for larger
    weights (T, n), and return their colour."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    style = styled(style, LineCollection, linewidth=0.8)
    colour = style.pop("color", None)
    colour = next_colours(ax, 1)[0] if colour is None else colour
    steps = np.stack([points[:-1], points[1:]], axis=2).reshape(-1, 2, 2)
    opacity = (weights[:-1] / weights.max(axis=1, keepdims=True)[:-1]).ravel()
    colours = [to_rgba(colour, 0.6 * alpha) for alpha in opacity]
    ax.add_collection(LineCollection(list(steps), **{"edgecolor": colours} | style))
    return colour


def links(ax: "Axes", ends: np.ndarray, masses: np.ndarray, style: dict[str, Any]) -> None:
    """Draw lines (L, 2, 2), more opaque for larger masses (L,)."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    style = styled(style, LineCollection, linewidth=1.2, zorder=2)
    colour = style.pop("color", "0.25")
    colours = [to_rgba(colour, mass / masses.max(initial=1e-300)) for mass in masses]
    ax.add_collection(LineCollection(list(ends), **{"edgecolor": colours} | style))
    ax.autoscale_view()
