"""The content of memory banks: enrichment by finding, a map over several banks, and the content over the epochs."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator

from charmlib import files
from charmlib.evaluation.enrichment import NONE, rows_of
from charmlib.evaluation.runs import number
from charmlib.viz.style import FIRST, GUIDE, SECOND, class_style, heading, mark_stages, number_map, readable, styled

PANELS = 9
"""Number of banks whose histories fit on one picture."""


@styled
def plot_enrichment(found: Mapping, *, title: str = "", note: str = ""):
    """Enrichment of each finding with its interval on a logarithmic axis, the rarest on top; returns the figure.

    ``found`` is ``metrics['bank']['enrichment']``. A finding in none of the slots is drawn as '0' at the left edge.
    """
    rows = rows_of(found)
    values, expected = (np.array([number(f[key]) for f in rows.values()]) for key in ("enrichment", "expected"))
    limits = np.array([[number(v) for v in f["interval"][:2]] for f in rows.values()])
    drawn = np.concatenate([values, limits.ravel(), expected, [1.0]])
    drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
    left, right = min(0.5, drawn.min() / 1.4), max(2.0, drawn.max() * 1.4)
    at = np.arange(len(rows), 0, -1.0)
    at[len(found["classes"]):] -= 0.6  # the findings, and below them their summaries
    figure, axis = plt.subplots(figsize=(8.4, 0.27 * len(rows) + 1.4), layout="constrained")
    axis.axvline(1, color=GUIDE, lw=1)
    axis.hlines(at, np.clip(np.nan_to_num(limits[:, 0], nan=left), left, None), np.nan_to_num(limits[:, 1], nan=left),
                color=FIRST, lw=2, alpha=0.5, label="95 % interval over patients")
    axis.plot(values[values > 0], at[values > 0], "o", color=FIRST, ms=6, label="this bank")
    for y in at[values == 0]:
        axis.annotate("0", (left, y), xytext=(3, 0), textcoords="offset points", va="center", color=FIRST, weight="bold")
    if np.isfinite(expected).any() and not np.allclose(expected[np.isfinite(expected)], 1):
        axis.plot(expected, at, "|", color=SECOND, ms=11, mew=2, label="slots drawn at random, each from its stage's images")
    axis.set(xscale="log", xlim=(left, right), ylim=(at.min() - 0.6, at.max() + 0.6),
             xlabel=f"share of the bank's {found['slots']:,} slots over prevalence in the training part")
    _round_ticks(axis.xaxis)
    axis.set_yticks(at, [f"{readable(name)}  {number(f['prevalence']):.1%}, {f['slots']:,} slots"
                         for name, f in rows.items()])
    axis.grid(axis="y", visible=False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return heading(figure, title, note)


@styled
def plot_enrichment_map(table: pd.DataFrame, *, title: str = "", note: str = ""):
    """Enrichment over that of slots drawn at random: banks in rows, findings in columns (the rarest first); returns the figure.

    ``table`` is made by :func:`charmlib.evaluation.enrichment.compare_enrichment`.
    """
    names = [c for c in table.columns if f"{c} low" in table]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = table[names].to_numpy(float) / table[[f"{c} expected" for c in names]].to_numpy(float)
        colour = np.clip(np.log2(values), -3, 3)
    figure, axis = plt.subplots(figsize=(max(0.52 * len(names) + 2.6, 6.5), 0.27 * len(table) + 3.0), layout="constrained")
    texts = [["" if not np.isfinite(v) else f"{v:.2f}" if v < 0.995 else f"{v:.3g}" if v >= 100 else f"{v:.1f}" for v in row]
             for row in values]
    image = number_map(axis, colour, texts, table["cell"], [readable(n) for n in names], fontsize=7,
                       slanted={"rotation": 40, "ha": "right"}, cmap="PuOr_r", vmin=-3, vmax=3, aspect="auto")
    figure.colorbar(image, ax=axis, ticks=[-3, -2, -1, 0, 1, 2, 3], shrink=0.9).set_ticklabels(
        ["1/8 or less", "1/4", "1/2", "1", "2", "4", "8 or more"])
    return heading(figure, title, f"Enrichment over that of slots drawn at random from the images on offer. {note}")


@styled
def plot_bank_history(histories: Mapping[str, pd.DataFrame | Sequence[pd.DataFrame]], prevalence: Mapping[str, float], *,
                      note: str = ""):
    """Content of the bank over the epochs, one panel per run: share of slots over prevalence, one line per finding.

    ``histories`` maps a name to ``bank_history.csv`` as a frame, or to several of one setting (seeds). These share a panel, and
    their slots are pooled epoch by epoch. The first :data:`PANELS` are drawn. ``prevalence`` maps each class, and
    ``no_finding``, to its share in the training part (:func:`charmlib.evaluation.enrichment.training_shares`). Returns the
    figure, in which a finding in none of the slots runs along the lower edge.
    """
    given = {name: [frames] if isinstance(frames, pd.DataFrame) else list(frames) for name, frames in histories.items()}
    shown = {name: pd.concat(frames).groupby(["stage", "epoch"], as_index=False).sum()
             for name, frames in list(given.items())[:PANELS]}
    shares = {name: p for name, p in sorted(prevalence.items(), key=lambda item: item[1]) if p and p > 0}
    lines = {name: {c: frame[c] / frame["filled"].where(frame["filled"] > 0) / p for c, p in shares.items() if c in frame}
             for name, frame in shown.items()}
    found = np.concatenate([np.ravel(v) for run in lines.values() for v in run.values()] or [[1.0]])
    found = found[np.isfinite(found) & (found > 0)]
    low, high = min(0.4, found.min(initial=1) / 1.5), max(2.5, found.max(initial=1) * 1.5)
    styles = {c: {"color": "#555555", "ls": ":", "lw": 2.2} if c == NONE else {**class_style(i), "lw": 1.3}
              for i, c in enumerate(shares)}
    columns, rows = min(3, max(len(shown), 1)), max(1, -(-len(shown) // 3))
    figure, axes = plt.subplots(rows, columns, figsize=(8.5 if columns == 1 else 3.3 * columns + 2.3,
                                                        max(2.5 * rows + 1.0, 0.19 * len(shares) + 1.5)),
                                squeeze=False, sharex=True, sharey=True, layout="constrained")
    for axis in axes.flat[len(shown):]:
        axis.axis("off")
    for axis, (name, run) in zip(axes.flat, lines.items()):
        frame, runs = shown[name], len(given[name])
        axis.axhline(1, color=GUIDE, lw=1)
        for c, values in run.items():
            axis.plot(np.arange(1, len(frame) + 1), values.clip(lower=low), **styles[c], marker="." if len(frame) < 4 else None)
        axis.set(title=files.readable(name) + (f" ({runs} runs)" if runs > 1 else ""), yscale="log", ylim=(low, high))
        _round_ticks(axis.yaxis)
        mark_stages(axis, frame["stage"])
    for axis in axes[-1]:
        axis.set_xlabel("epoch of the stage (dotted line: next stage)")
    figure.supylabel("share of slots over prevalence", fontsize=9)
    figure.legend([plt.Line2D([], [], **styles[c]) for c in shares], [f"{readable(c)} {p:.1%}" for c, p in shares.items()],
                  loc="outside right center", title="prevalence in training")
    left_out = f"; {len(given) - len(shown)} more settings are not drawn" if len(given) > len(shown) else ""
    return heading(figure, "", "Content of the bank at the end of each epoch (the best epoch's is kept); none of a finding at "
                               f"the lower edge{left_out}. {note}")


def _round_ticks(axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()
