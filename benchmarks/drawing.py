"""Where a benchmark draws: axes side by side, kept as a PNG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextmanager
def drawn(
    path: Path, size: tuple[float, float], *, widths: Sequence[float] = (1.0,), sharex: bool = False
) -> Iterator[tuple[Axes, ...]]:
    """
    Args:
        size: of the figure, in inches. widths: of the axes, relative to each other.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(widths), figsize=size, width_ratios=widths, sharex=sharex, squeeze=False
    )
    try:
        yield tuple(axes[0])
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    finally:
        pyplot.close(figure)
