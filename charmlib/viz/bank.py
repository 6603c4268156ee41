"""What a memory bank holds: enrichment by finding, of several banks, and how it filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator

from charmlib.evaluation.enrichment import NONE, rows_of
from charmlib.viz.style import FIRST, GUIDE, SECOND, class_style, heading, readable, styled

PANELS = 9
"""Banks whose histories fit on one picture."""

_TICKS = FuncFormatter(lambda value, _: f"{value:g}")


@styled
def plot_enrichment(found: Mapping, *, title: str = "", note: str = ""):
    """Enrichment of each finding with its interval on a logarithmic axis, the rarest on top; returns the figure.

    ``found`` is ``metrics['bank']['enrichment']``. A finding that no slot holds stands at the left edge, as '0'.
    """
    rows = rows_of(found)
    values = np.array([_number(f["enrichment"]) for f in rows.values()])
    limits = np.array([[_number(v) for v in f["interval"][:2]] for f in rows.values()])
    expected = np.array([_number(f["expected"]) for f in rows.values()])
    drawn = np.concatenate([values, limits.ravel(), expected, [1.0]])
    drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
    left, right = min(0.5, drawn.min() / 1.4), max(2.0, drawn.max() * 1.4)
    at = np.arange(len(rows), 0, -1.0)
    at[len(found["classes"]):] -= 0.6  # the findings, and below them what sums them up
    figure, axis = plt.subplots(figsize=(8.4, 0.27 * len(rows) + 1.4), layout="constrained")
    axis.axvline(1, color=GUIDE, lw=1)
    some, none = values > 0, values == 0
    axis.hlines(at, np.clip(np.nan_to_num(limits[:, 0], nan=left), left, None), np.nan_to_num(limits[:, 1], nan=left),
                color=FIRST, lw=2, alpha=0.5, label="95 % interval over patients")
    axis.plot(values[some], at[some], "o", color=FIRST, ms=6, label="this bank")
    for y in at[none]:
        axis.annotate("0", (left, y), xytext=(3, 0), textcoords="offset points", va="center", color=FIRST, weight="bold")
    if np.isfinite(expected).any() and not np.allclose(expected[np.isfinite(expected)], 1):
        axis.plot(expected, at, "|", color=SECOND, ms=11, mew=2, label="slots drawn at random, each from its stage's images")
    axis.set_xscale("log")
    axis.set(xlim=(left, right), ylim=(at.min() - 0.6, at.max() + 0.6),
             xlabel=f"share of the bank's {found['slots']:,} slots over prevalence in the training part")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(_TICKS)
    axis.xaxis.minorticks_off()
    axis.set_yticks(at, [f"{readable(name)}  {_number(f['prevalence']):.1%}, {f['slots']:,} slots"
                         for name, f in rows.items()])
    axis.grid(axis="y", visible=False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    heading(figure, title, note)
    return figure


@styled
def plot_enrichment_map(table: pd.DataFrame, *, title: str = "", note: str = ""):
    """Banks in rows, findings in columns (the rarest first), enrichment over what slots drawn at random would have, in colour
    and number; returns the figure.

    ``table`` is :func:`charmlib.evaluation.enrichment.compare_enrichment`'s.
    """
    names = [c for c in table.columns if f"{c} low" in table]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = table[names].to_numpy(float) / table[[f"{c} expected" for c in names]].to_numpy(float)
        colour = np.clip(np.log2(values), -3, 3)
    figure, axis = plt.subplots(figsize=(0.52 * len(names) + 2.6, 0.27 * len(table) + 2.0), layout="constrained")
    image = axis.imshow(colour, cmap="PuOr_r", vmin=-3, vmax=3, aspect="auto")
    for r, c in zip(*np.nonzero(np.isfinite(values))):
        v = values[r, c]
        axis.text(c, r, f"{v:.2f}" if v < 0.995 else f"{v:.3g}" if v >= 100 else f"{v:.1f}", ha="center", va="center",
                  fontsize=7, color="white" if abs(colour[r, c]) > 2 else "black")
    axis.set_xticks(range(len(names)), [readable(n) for n in names], rotation=40, ha="right")
    axis.set_yticks(range(len(table)), table["cell"])
    axis.grid(False)
    bar = figure.colorbar(image, ax=axis, ticks=[-3, -2, -1, 0, 1, 2, 3], shrink=0.9)
    bar.set_ticklabels(["1/8 or less", "1/4", "1/2", "1", "2", "4", "8 or more"])
    heading(figure, title, f"Enrichment over that of slots drawn at random from what was on offer. {note}")
    return figure


@styled
def plot_bank_history(histories: Mapping[str, pd.DataFrame | Sequence[pd.DataFrame]], prevalence: Mapping[str, float], *,
                      note: str = ""):
    """What filled the bank over the epochs, a panel a run: share of slots over prevalence, a line a finding.

    Parameters
    ----------
    histories : mapping
        Name -> ``bank_history.csv`` as a frame, or several of one setting (seeds), which share a panel: their slots
        are counted together, epoch by epoch. The first :data:`PANELS` are drawn.
    prevalence : mapping
        Class -> share of positives in the training part, and ``no_finding``; see
        :func:`charmlib.evaluation.enrichment.training_shares`.

    Returns
    -------
    The figure. A finding that no slot holds runs along the lower edge.
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
    columns = min(3, max(len(shown), 1))
    rows = -(-max(len(shown), 1) // columns)
    wide = 6.2 if columns == 1 else 3.3
    figure, axes = plt.subplots(rows, columns, figsize=(wide * columns + 2.3, 2.5 * rows + 1.0), squeeze=False, sharex=True,
                                sharey=True, layout="constrained")
    for axis in axes.flat[len(shown):]:
        axis.axis("off")
    for axis, (name, run) in zip(axes.flat, lines.items()):
        frame, runs = shown[name], len(given[name])
        axis.axhline(1, color=GUIDE, lw=1)
        for c, values in run.items():
            axis.plot(np.arange(1, len(frame) + 1), values.clip(lower=low), **styles[c], marker="." if len(frame) < 4 else None)
        border = int((frame["stage"].astype(str) == "1").sum())
        if 0 < border < len(frame):
            axis.axvline(border + 0.5, color=GUIDE, lw=1, ls=":")
        axis.set_title(name + (f" ({runs} runs)" if runs > 1 else ""))
        axis.set_yscale("log")
        axis.set_ylim(low, high)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(_TICKS)
        axis.yaxis.minorticks_off()
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[-1]:
        axis.set_xlabel("epoch (dotted line: stage 2 begins)")
    figure.supylabel("share of slots over prevalence", fontsize=9)
    handles = [plt.Line2D([], [], **styles[c]) for c in shares]
    figure.legend(handles, [f"{readable(c)} {p:.1%}" for c, p in shares.items()], loc="outside right center",
                  title="prevalence in training")
    left_out = f"; {len(given) - len(shown)} more settings are not drawn" if len(given) > len(shown) else ""
    heading(figure, "", f"What filled the bank by the end of each epoch (the best epoch's is kept): along the lower edge, none"
                        f"{left_out}. {note}")
    return figure


def _number(value) -> float:
    return float("nan") if value is None else float(value)
