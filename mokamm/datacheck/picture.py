"""The histogram of the rows' lengths: one colour a source, a line at data.max_length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mokamm.datacheck.summary import SourceSummary

SHOWN = 8  # sources with a colour of their own; the rest share one


def draw(sources: Sequence[SourceSummary], max_length: int, path: Path) -> None:
    """Write a PNG. Rows that cannot be laid out are not in it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    largest = sorted(sources, key=lambda source: -len(source.prompts))
    names = [source.name for source in largest[:SHOWN]]
    lengths = [source.lengths() for source in largest[:SHOWN]]
    if rest := [source.lengths() for source in largest[SHOWN:]]:
        names.append(f"{len(rest)} more sources")
        lengths.append(np.concatenate(rest))
    longest = max([max_length, *(int(values.max()) for values in lengths if len(values))])
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.hist(lengths, bins=np.linspace(0, longest + 1, 61).tolist(), stacked=True, label=names)
    axes.axvline(max_length, color="black", linestyle="--", label=f"data.max_length = {max_length}")
    axes.set(xlabel="tokens of a row (text, media and answer)", ylabel="rows", title="Lengths of the rows")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
