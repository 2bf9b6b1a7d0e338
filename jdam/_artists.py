"""What `jdam.plot` asks of matplotlib, which is imported when something is drawn only."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: How many colours of a property cycle to take before they repeat: a multiple of usual lengths.
COLOURS = 60


def axes(ax: "Axes | None") -> "Axes":
    """`ax`, the current axes if None."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("jdam.plot needs matplotlib: pip install 'jdam[plot]'") from error
    return plt.gca() if ax is None else ax


def labelled(ax: "Axes", names: tuple[str, str]) -> "Axes":
    """The axes, with these labels where they had none."""
    if not ax.get_xlabel():
        ax.set_xlabel(names[0])
    if not ax.get_ylabel():
        ax.set_ylabel(names[1])
    return ax


def next_colours(ax: "Axes", num: int, *, filled: bool = False) -> np.ndarray:
    """The next colours (num, 4) of the property cycle of lines, or of what is filled."""
    from matplotlib.colors import to_rgba_array

    artists: list[Any] = []
    # Matplotlib tells the next colour by drawing with it.
    for _ in range(min(num, COLOURS)):
        artists += ax.fill([], []) if filled else ax.plot([], [])
    colours = [artist.get_facecolor() if filled else artist.get_color() for artist in artists]
    for artist in artists:
        artist.remove()
    return np.resize(to_rgba_array(colours), (num, 4))


def colours_of(ax: "Axes", features: np.ndarray) -> np.ndarray:
    """Colours (M, 4) of atoms by their features (…, k): one of the property cycle for each largest
    feature, as of one-hot labels; along the colour map for single numbers."""
    from matplotlib import colormaps, rcParams
    from matplotlib.colors import Normalize

    rows = features.reshape(-1, features.shape[-1])
    if rows.shape[1] > 1:
        found: np.ndarray = next_colours(ax, rows.shape[1], filled=True)[rows.argmax(1)]
        return found
    shades = Normalize()(rows[:, 0]).filled()
    return np.asarray(colormaps[rcParams["image.cmap"]](shades))


def styled(style: dict[str, Any], artist: type, **default: Any) -> dict[str, Any]:
    """`style` over `default`, with lw, ec, … spelled out, so that they replace it."""
    from matplotlib.cbook import normalize_kwargs

    return default | normalize_kwargs(style, artist)


def faded(colours: Any, weights: np.ndarray) -> np.ndarray:
    """The colours (N·K, 4) of components, of weights (…, K), from those of their mixtures."""
    from matplotlib.colors import to_rgba_array

    shares = np.sqrt(weights / weights.max(-1, keepdims=True)).reshape(-1, weights.shape[-1])
    found: np.ndarray = np.resize(to_rgba_array(colours), (len(shares), 4))
    found = found.repeat(shares.shape[1], axis=0)
    found[:, 3] *= shares.ravel()
    return found


def dots(ax: "Axes", outlines: np.ndarray, colours: Any) -> None:
    """A dot for each outline that is a point, of which nothing would be drawn."""
    from matplotlib.colors import to_rgba_array

    points = np.flatnonzero(np.ptp(outlines, axis=1).max(-1) == 0)
    if points.size:
        colours = np.resize(to_rgba_array(colours), (len(outlines), 4))
        xs, ys = outlines[points, 0].T
        ax.scatter(xs, ys, s=16, c=colours[points], zorder=2)


def contours(ax: "Axes", xs: Any, ys: Any, found: np.ndarray, style: dict[str, Any]) -> None:
    """Filled contours of energies, whose levels lie closer near the minimum."""
    from matplotlib.colors import PowerNorm

    low, high = found.min(), found.max()
    levels = low + (high - low) * np.linspace(0, 1, 25) ** 2
    ax.contourf(xs, ys, found, **{"norm": PowerNorm(0.5, low, high), "levels": levels} | style)


def links(ax: "Axes", ends: np.ndarray, masses: np.ndarray, style: dict[str, Any]) -> None:
    """Lines (L, 2, 2), as opaque as their masses (L,) are large."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    style = styled(style, LineCollection, linewidth=1.2, zorder=2)
    colour = style.pop("color", "0.25")
    faded = [to_rgba(colour, mass / masses.max(initial=1e-300)) for mass in masses]
    ax.add_collection(LineCollection(list(ends), **{"edgecolor": faded} | style))
    ax.autoscale_view()
