"""The interactive explorer: walk along a ROC curve and see numbers and images change sides.

Built from plain sliders, dropdowns, ``HTML`` and ``Image`` widgets with observers (``interact`` and ``Output`` hang at random
under papermill). Without a person it draws static pictures and makes no widget.
"""

import contextlib
import functools
import html
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from scipy.special import expit

from charmlib import files
from charmlib.data.show import show_images
from charmlib.evaluation.compare import aligned, compare, verdict
from charmlib.evaluation.intervals import interval, operating_resamples
from charmlib.evaluation.operating import RATES
from charmlib.evaluation.runs import run_folders, run_names, valid_auc
from charmlib.evaluation.score import evaluate_run
from charmlib.evaluation.tables import point_note, split_note, with_intervals
from charmlib.session import person_watches
from charmlib.viz.curves import plot_roc_bands
from charmlib.viz.page import png
from charmlib.viz.per_class import plot_counts
from charmlib.viz.style import FIRST, GUIDE, RC, SECOND, readable
from charmlib.viz.walk import ORDERS, Walk

SHOWN = 8
"""Images in a row."""

_DIFFER = "the two runs differ most"
_BY_HAND, _NONE = "(by hand)", "(none)"
_STYLE = """<style>.walk td{padding:2px 12px 2px 0}.walk .v{font-weight:600;text-align:right}.walk .i{color:#666}
.cm td,.cm th{border:1px solid #bbb;padding:3px 12px;text-align:right}</style>"""


class Explorer:
    """Look at finished runs.

    >>> Explorer(["runs/demo"], image_of=read).show()          # doctest: +SKIP

    Parameters
    ----------
    runs : folders of runs, or of grids, of which all cells are taken
        The best by validation comes first, those without a validation part last.
        A folder without finished runs raises FileNotFoundError.
    image_of : callable, optional
        Image id -> (H, W) uint8, for a run's metrics: ``image_of(metrics, image_id)``. Without it, or if it raises
        OSError or KeyError, the place of an image is grey.

    Attributes
    ----------
    folders : dict
        Name -> RunFolder.
    scored : callable
        Name -> metrics and test predictions of a run, scored anew once.
    """

    def __init__(self, runs: Sequence[str | Path], image_of: Callable | None = None):
        found = run_folders(runs)
        self.folders = dict(sorted(zip(run_names(found), found), key=lambda item: (
            item[1].metrics["valid"] is None, -np.nan_to_num(valid_auc(item[1].metrics)))))
        self._image_of = image_of
        self.scored = functools.cache(lambda name: evaluate_run(self.folders[name]))
        self._image, self.comparison = functools.cache(self._read_image), functools.cache(self._compare)

    def comparable(self, name: str) -> list[str]:
        """The other runs that were scored on the same images, labels and classes."""
        scored_on = {other: (run.metrics["split"]["hash"], run.metrics["params"]["labels"], run.metrics["classes"])
                     for other, run in self.folders.items()}
        return [other for other, what in scored_on.items() if other != name and what == scored_on[name]]

    def show(self) -> None:
        """Display the explorer to a person; otherwise its static pictures."""
        from IPython.display import display

        if person_watches():
            display(self.widget())
            return
        for figure in self.static():
            display(figure)
            plt.close(figure)

    def static(self) -> list[Figure]:
        """Interval bands, counts at the operating point (if it has one) and the worst errors of the first run."""
        name = next(iter(self.folders))
        metrics, test = self.scored(name)
        note = split_note(metrics)
        best = max(test.positives, key=test.positives.get)
        walk = Walk(test.labels, test.logits, test.classes.index(best))
        operating = metrics["test"]["operating"].get("youden", {})
        row = operating.get(best)
        at = walk.at_threshold(row["threshold"]) if row else int(walk.stations()[len(walk.stations()) // 2])
        figures = [plot_roc_bands(test, metrics["test"], title=name, note=note)]
        if operating:
            figures.append(plot_counts(operating, title=name, note=f"{note}; {point_note(metrics['test'], 'youden')}"))
        end = f"at p ≥ {_digits(walk.point(at)['threshold'])}. {note}"
        return figures + [self.images(name, walk, walk.by_error(order, at), f"{readable(best)}, worst {order} {end}")
                          for order in ORDERS[1:]]

    def widget(self):
        """The widgets, one box that can be displayed."""
        return _Board(self).box

    def images(self, name: str, walk: Walk, positions: np.ndarray, note: str = "", other: np.ndarray | None = None) -> Figure:
        """The first images in a row, with id, label and probability each, and the probability in ``other`` (n_test,)."""
        _, test = self.scored(name)
        positions = positions[:SHOWN]
        with plt.rc_context(RC):
            figure = Figure(figsize=(1.32 * SHOWN, 1.75 + 0.25 * bool(note)), layout="constrained")
            titles = [f"{Path(test.ids[walk.rows[p]]).stem}\n{'positive' if walk.y[p] else 'negative'}, "
                      f"p {_digits(walk.probability[p])}" + (f", {_digits(other[walk.rows[p]])}" if other is not None else "")
                      for p in positions]
            show_images([self._image(name, str(test.ids[walk.rows[p]])) for p in positions], titles,
                        axes=figure.subplots(1, SHOWN))
            if note:
                figure.suptitle(files.readable(note), fontsize=9)
        return figure

    def _read_image(self, name: str, image_id: str) -> np.ndarray:
        with contextlib.suppress(OSError, KeyError):
            if self._image_of:
                return self._image_of(self.folders[name].metrics, image_id)
        return np.full((8, 8), 235, np.uint8)

    def _compare(self, first: str, second: str) -> str:
        table = compare(self.scored(first)[1], self.scored(second)[1])
        shown = with_intervals(table.rename(columns={"low": "difference low", "high": "difference high"}))
        return (f"<p><b>{html.escape(verdict(table, first, second))}</b></p><details><summary>by class"
                f"</summary>{shown.to_html(index=False, border=0)}</details>")


class _Board:
    """The widgets and their observers."""

    def __init__(self, explorer: Explorer):
        import ipywidgets as w

        self.explorer, self._quiet = explorer, False
        initial, wrap = {"description_width": "initial"}, w.Layout(flex_flow="row wrap", align_items="center")
        choice = functools.partial(w.Dropdown, style=initial, layout=w.Layout(width="auto"))
        self.run = choice(options=list(explorer.folders), description="run")
        self.other = choice(options=[_NONE], description="compare with")
        self.finding = choice(options=[], description="finding")
        self.point = choice(options=[], description="go to operating point")
        self.slider = w.IntSlider(0, 0, 1, description="along the ROC curve", continuous_update=False, readout=False,
                                  style=initial, layout=w.Layout(width="98%"))
        self.numbers, self.moved, self.said, self.pages, self.note = (w.HTML() for _ in range(5))
        self.curve = w.Image(format="png", layout=w.Layout(width="430px", height="400px"))
        self.changed, self.errors = (w.Image(format="png", layout=w.Layout(width="100%", max_width="1060px")) for _ in "ab")
        self.order = choice(options=list(ORDERS), description="test images by")
        self.page = w.IntSlider(1, 1, 2, description="page", continuous_update=False, layout=w.Layout(width="420px"))
        self.box = w.VBox([self.note, w.HBox([self.run, self.finding, self.point, self.other], layout=wrap), self.slider,
                           w.HBox([self.curve, self.numbers], layout=wrap), self.moved, self.changed,
                           w.HBox([self.order, self.pages, self.page], layout=wrap), self.errors, self.said])
        for widget, react in ((self.run, self._new_run), (self.finding, self._new_finding), (self.point, self._go_to_point),
                              (self.slider, self._slide), (self.other, self._new_other), (self.order, self._new_order),
                              (self.page, self._draw_errors)):
            widget.observe(functools.partial(self._react, react), names="value")
        self._react(self._new_run, None)

    def _react(self, react: Callable[[], None], _change) -> None:
        """Run an observer, unless the program itself made the change."""
        if self._quiet:
            return
        self._quiet = True
        try:
            react()
        finally:
            self._quiet = False

    def _new_run(self) -> None:
        self.metrics, self.test = self.explorer.scored(self.run.value)
        drawn = "<b>Drawn phantoms, not radiographs.</b> " if self.metrics["data"]["drawn"] else ""
        self.note.value = f"{drawn}{html.escape(split_note(self.metrics))}. Research use only."
        count = self.test.positives
        usable = [name for name, positives in count.items() if positives] or list(count)
        _offer(self.finding, [(f"{readable(name)} ({count[name]:,})", name) for name in usable], max(usable, key=count.get))
        points = [*self.metrics["test"]["operating"], _BY_HAND]
        _offer(self.point, points, points[0])
        _offer(self.other, [_NONE, *self.explorer.comparable(self.run.value)], _NONE)
        self._new_finding()

    def _new_finding(self) -> None:
        self.c = self.test.classes.index(self.finding.value)
        self.walk = Walk(self.test.labels, self.test.logits, self.c)
        self.stations = self.walk.stations()
        self.slider.max = len(self.stations) - 1
        self.at = None
        if self.point.value == _BY_HAND:
            self.point.value = self.point.options[0]
        self._go_to_point()
        self._new_other(redraw=False)

    def _go_to_point(self) -> None:
        if self.point.value == _BY_HAND and self.at is not None:
            return
        row = self.metrics["test"]["operating"].get(self.point.value, {}).get(self.finding.value)
        if row is None:  # validation had no positives of the finding, or the run had no validation part
            self.point.value = _BY_HAND
        target = self.walk.at_threshold(row["threshold"]) if row else int(self.stations[len(self.stations) // 2])
        self.slider.value = int(np.abs(self.stations - target).argmin())
        self._move(target, row)

    def _slide(self) -> None:
        self.point.value = _BY_HAND
        self._move(int(self.stations[self.slider.value]))

    def _move(self, target: int, stored: dict | None = None) -> None:
        before, self.at = self.at, target
        self.numbers.value = self._table(stored)
        if self.order.value in ORDERS[1:]:
            self._new_order()
        self._draw_curve()
        if before is None or before == target:
            self.moved.value = "<b>Images that change sides</b> as the slider moves appear here."
            self.changed.value, self.changed.layout.display = _BLANK, "none"
            return
        positions = self.walk.between(before, target)
        way = "now" if target > before else "no longer"
        right = int(self.walk.y[positions].sum())
        self.moved.value = (f"<b>{len(positions):,} images change sides</b>: {way} called "
                            f"{html.escape(readable(self.finding.value))}; {right:,} positives, {len(positions) - right:,} "
                            f"negatives" + (f". The {SHOWN} next to the new threshold:" if len(positions) > SHOWN else ":"))
        self.changed.value = png(self.explorer.images(self.run.value, self.walk, positions), 100)
        self.changed.layout.display = ""

    def _table(self, stored: dict | None) -> str:
        """The numbers at the point; at an operating point with its stored threshold and the intervals of the report."""
        here = stored or self.walk.point(self.at)
        if not stored and np.isfinite(here["threshold"]):
            column = slice(self.c, self.c + 1)
            found = operating_resamples(self.test.labels[:, column], self.test.logits[:, column], self.test.patients,
                                        [here["threshold"]], resamples=300)
            here |= {f"{rate}_interval": interval(drawn[:, 0]) for rate, drawn in found.items()}
        rows = "".join(_row(rate, here[rate], here.get(f"{rate}_interval")) for rate in RATES)
        threshold = f"p ≥ {_digits(here['threshold'])}" if np.isfinite(here["threshold"]) else "above all"
        return (f"{_STYLE}<table class='walk'><tr><td>threshold</td><td class='v'>{threshold}</td><td></td></tr>{rows}</table>"
                "<br><table class='cm'><tr><th></th><th>predicted positive</th><th>predicted negative</th></tr>"
                f"<tr><th>positive</th><td>{here['tp']:,}</td><td>{here['fn']:,}</td></tr>"
                f"<tr><th>negative</th><td>{here['fp']:,}</td><td>{here['tn']:,}</td></tr></table>"
                "<p style='color:#666'>in brackets: 95 % intervals over patients at a fixed threshold<br>"
                f"({1000 if stored else 300} resamples)</p>")

    def _draw_curve(self) -> None:
        here = self.walk.point(self.at)
        with plt.rc_context(RC):
            figure = Figure(figsize=(4.3, 4.0), layout="constrained")
            axis = figure.subplots()
            axis.plot([0, 1], [0, 1], color=GUIDE, lw=0.8)
            self._plot(axis, self.run.value, self.walk, color=FIRST, lw=1.6)
            if self.other.value != _NONE:
                _, test = self.explorer.scored(self.other.value)
                self._plot(axis, self.other.value, Walk(test.labels, test.logits, self.c), color="#222222", lw=1.2, ls="--")
            axis.plot(1 - here["specificity"], here["sensitivity"], "o", ms=9, color=SECOND, mec="white")
            axis.set(xlim=(-0.01, 1), ylim=(0, 1.01), xlabel="false positive rate (1 - specificity)",
                     ylabel="true positive rate (sensitivity)", title=readable(self.finding.value))
            axis.legend(loc="lower right")
        self.curve.value = png(figure, 100)

    def _plot(self, axis, name: str, walk: Walk, **style) -> None:
        auc = self.explorer.scored(name)[0]["test"]["auc"][self.finding.value]
        axis.plot(walk.fp / max(walk.fp[-1], 1), walk.tp / max(walk.tp[-1], 1), label=f"{auc:.3f}  {files.readable(name)}",
                  **style)

    def _new_other(self, redraw: bool = True) -> None:
        compared = self.other.value != _NONE
        _offer(self.order, [*ORDERS, _DIFFER] if compared else ORDERS, ORDERS[0])
        self.said.value = self.explorer.comparison(self.run.value, self.other.value) if compared else ""
        if redraw:
            self._draw_curve()
        self._new_order()

    def _new_order(self) -> None:
        self.theirs = None
        if self.order.value in ORDERS:
            self.positions = self.walk.by_error(self.order.value, self.at)
        else:
            mine, theirs = aligned(self.test, self.explorer.scored(self.other.value)[1])
            self.theirs = expit(theirs.logits[:, self.c].astype(np.float64))
            rank = [np.argsort(np.argsort(p.logits[self.walk.rows, self.c])) for p in (mine, theirs)]
            self.positions = np.argsort(-np.abs(rank[0] - rank[1]), kind="stable")
        count = -(-len(self.positions) // SHOWN)
        self.page.value, self.page.max = 1, max(count, 2)  # a slider with a single value breaks in the browser: it is hidden
        self.page.layout.display = "" if count > 1 else "none"
        self.pages.value = (f"{len(self.positions):,} images on {count:,} pages"
                            + ("" if self.theirs is None else "; p of both runs"))
        self._draw_errors()

    def _draw_errors(self) -> None:
        self.errors.value = png(self.explorer.images(self.run.value, self.walk, self.positions[(self.page.value - 1) * SHOWN:],
                                                     other=self.theirs), 100)


def _offer(dropdown, options: Sequence, otherwise: str) -> None:
    """New options, values or (label, value); the value stays if it is among them, else it becomes ``otherwise``."""
    kept = dropdown.value
    dropdown.options = list(options)
    dropdown.value = kept if kept in (option[1] if isinstance(option, tuple) else option for option in options) else otherwise


_BLANK = png(Figure(figsize=(0.1, 0.1)), 100)


def _digits(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"


def _row(rate: str, value: float, limits: Sequence[float] | None) -> str:
    span = "" if limits is None or np.isnan(limits[0]) else f"({limits[0]:.3f} to {limits[1]:.3f})"
    return (f"<tr><td>{rate.replace('f1', 'F1')}</td><td class='v'>{'undefined' if np.isnan(value) else f'{value:.3f}'}</td>"
            f"<td class='i'>{span}</td></tr>")
