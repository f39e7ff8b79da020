"""The look that all pictures share, drawn without a display or a global state."""

from pathlib import Path
from typing import Any


INK, QUIET = "#1f2933", "#9aa5b1"
# Okabe and Ito's colours, told apart by colour-blind readers too; the light ones darkened to be read as text.
COLOURS = ("#0072b2", "#d55e00", "#6b6b6b", "#009e73", "#cc79a7", "#b87d00", "#3a9bd1", "#000000")
STYLE = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.dpi": 160,
}


def load_figures() -> Any:
    """Return matplotlib, for its style context, and its figure class.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
        import matplotlib.ticker
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib. Run: pip install "hf_longalign[plot]"') from error
    return matplotlib, Figure


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure as a PNG, equal figures as equal bytes, into a folder that is made; return the file's path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Else matplotlib writes its version into the file.
    figure.savefig(path, metadata={"Software": None})
    return path
