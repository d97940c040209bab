"""One style for all plots, light or dark, with colours that the colour-blind can tell apart."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import extra
from .files import replace_file

#: Okabe and Ito's colours, as seen on white and on black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_ON_DARK = ("#56B4E9", "#E69F00", "#2FC79B", "#F0794A", "#E29BC4", "#8CC8F0")
#: Of small and great values, and of values around 0.
SEQUENTIAL, DIVERGING = "cividis", "PuOr"
#: Fonts for names of classes in other scripts, where they are installed.
_SCRIPTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC"),
    *("Hiragino Sans", "Malgun Gothic", "Noto Sans Devanagari", "Noto Sans Arabic", "Arial Unicode MS"),
)
_WIDTH = 8.6  # inches: about 950 pixels, what a README shows


@contextmanager
def style(dark: bool = False) -> Iterator[None]:
    """Matplotlib's settings for pictures that are made inside."""
    with extra("train"):
        import matplotlib
        from cycler import cycler
        from matplotlib.font_manager import get_font_names

    ink, paper = ("#d8dee9", "#14181f") if dark else ("#222222", "#ffffff")
    settings: Any = {
        "axes.prop_cycle": cycler(color=_ON_DARK if dark else COLOURS),
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "figure.titlesize": "large",
        "font.family": ["DejaVu Sans", *(name for name in _SCRIPTS if name in get_font_names())],
        "font.size": 9,
        "grid.alpha": 0.25,
        "image.cmap": SEQUENTIAL,
        "legend.frameon": False,
        "savefig.dpi": 110,
        "text.parse_math": False,  # names of classes may hold dollar signs
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color"), ink),
        **dict.fromkeys(("ytick.color", "grid.color"), ink),
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(title: str, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of a README's width and its axes, rows × columns.

    Args:
        title: Of the whole.
        height: Inches.
        options: Of ``Figure.subplots``.
    """
    with extra("train"):
        from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    figure.suptitle(title)
    return figure, axes


def shades(count: int) -> list[Any]:
    """Colours of so many lines; of many, from dark to light, as of things in order."""
    if count <= len(COLOURS):
        return [f"C{i}" for i in range(count)]
    from matplotlib import colormaps

    return [colormaps[SEQUENTIAL](i / count) for i in range(count)]


def short(name: str, most: int = 22) -> str:
    """A name, cut so that it fits beside a picture."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def png(figure: Any) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # no font here has every script
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def write_png(figure: Any, path: Path) -> None:
    """A figure into a file, which is replaced whole."""
    replace_file(path, png(figure))
