"""The interactive explorer: walk along a ROC curve and see numbers and images change sides.

Built from plain sliders, dropdowns, ``HTML`` and ``Image`` widgets with observers (``interact`` and ``Output`` hang at random
where papermill runs a notebook). Without a person it draws static pictures and makes no widget at all.
"""

from __future__ import annotations

import functools
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from scipy.special import expit

from charmlib.data.show import show_images
from charmlib.evaluation.compare import aligned, compare, verdict
from charmlib.evaluation.evaluate import evaluate_run, run_folders, run_names
from charmlib.evaluation.intervals import Interval, enough_patients, interval, operating_resamples
from charmlib.evaluation.runs import RunFolder, valid_auc
from charmlib.evaluation.tables import point_note, split_note, with_intervals
from charmlib.evaluation.walk import Walk
from charmlib.session import person_watches
from charmlib.viz.counts import plot_counts
from charmlib.viz.roc import plot_roc_bands
from charmlib.viz.style import FIRST, GUIDE, RC, SECOND, readable

SHOWN = 8
"""Images in a row."""

_ORDERS = {"largest error": "all", "missed findings": "missed", "false alarms": "false alarms"}
_DIFFER = "the two runs differ most"
_BY_HAND = "(by hand)"


class Explorer:
    """Look at finished runs.

    >>> Explorer(["runs/demo"], image_of=read).show()          # doctest: +SKIP

    Parameters
    ----------
    runs : folders of runs, or of grids, whose cells are then all in; the best by validation comes first, those
        without a validation part last
    image_of : callable, optional
        Image id -> (H, W) uint8, for a run's metrics: ``image_of(metrics, image_id)``. Without it, or where it raises
        OSError or KeyError, images are named and not shown.

    Raises
    ------
    FileNotFoundError
        A folder without finished runs.
    """

    def __init__(self, runs: Sequence[str | Path], image_of: Callable | None = None):
        folders = run_folders(runs)
        found = {name: (folder, RunFolder(folder).metrics) for name, folder in zip(run_names(folders), folders)}
        best_first = sorted(found, key=lambda name: (found[name][1]["valid"] is None,
                                                     -np.nan_to_num(valid_auc(found[name][1]))))
        self.folders = {name: found[name][0] for name in best_first}
        self.comparable = {name: (m["split"]["hash"], m["params"].get("labels", "real"), tuple(m["classes"]))
                           for name, (_, m) in found.items()}
        """Runs that agree in these were scored on the same images, labels and classes."""
        self._image_of = image_of
        self._scored: dict[str, tuple] = {}
        self._images: dict[tuple[str, str], np.ndarray | None] = {}
        self._compared: dict[tuple[str, str], str] = {}

    def scored(self, name: str) -> tuple[dict, object]:
        """Metrics and test predictions of a run, scored anew once."""
        if name not in self._scored:
            self._scored[name] = evaluate_run(self.folders[name])
        return self._scored[name]

    def show(self) -> None:
        """Display the explorer to a person; to anyone else its static pictures."""
        from IPython.display import display

        if person_watches():
            display(self.widget())
            return
        for figure in self.static():
            display(figure)
            plt.close(figure)

    def static(self) -> list[Figure]:
        """Interval bands, counts at the operating point (where it has one) and the worst errors of the first run."""
        name = next(iter(self.folders))
        metrics, test = self.scored(name)
        note = split_note(metrics)
        best = max(test.positives, key=test.positives.get)
        walk = Walk(test.labels, test.logits, test.classes.index(best))
        operating = metrics["test"]["operating"].get("youden", {})
        row = operating.get(best)
        at = walk.at_threshold(row["threshold"]) if row else int(walk.stations()[len(walk.stations()) // 2])
        return [plot_roc_bands(test, metrics["test"], title=name, note=note),
                *([plot_counts(operating, title=name, note=f"{note}; {point_note(metrics['test'], 'youden')}")]
                  if operating else []),
                *(self._row(name, walk, walk.by_error(which, at)[:SHOWN],
                            f"{readable(best)}, {label} at p ≥ {_digits(walk.stand(at).threshold)}, the worst. {note}")
                  for label, which in _ORDERS.items() if which != "all")]

    def widget(self):
        """The widgets, one box that can be displayed."""
        return _Board(self).box

    # -- pictures ---------------------------------------------------------------------------------------------------

    def _image(self, name: str, image_id: str) -> np.ndarray:
        key = name, image_id
        if key not in self._images:
            try:
                image = self._image_of(self.scored(name)[0], image_id) if self._image_of else None
            except (OSError, KeyError):
                image = None
            self._images[key] = np.full((8, 8), 235, np.uint8) if image is None else image
        return self._images[key]

    def _row(self, name: str, walk: Walk, places: np.ndarray, note: str = "", other: np.ndarray | None = None) -> Figure:
        """Some images in a row, each with its id, label and probability (and that of another run, by row of the test part)."""
        _, test = self.scored(name)
        with plt.rc_context(RC):
            figure = Figure(figsize=(1.32 * SHOWN, 1.75 + 0.25 * bool(note)), layout="constrained")
            axes = figure.subplots(1, SHOWN)
            chosen = [int(p) for p in places[:SHOWN]]
            titles = [f"{Path(test.ids[walk.rows[p]]).stem}\n{'has it' if walk.y[p] else 'has it not'}, "
                      f"p {_digits(walk.probability[p])}" + (f", {_digits(other[walk.rows[p]])}" if other is not None else "")
                      for p in chosen]
            images = [self._image(name, test.ids[walk.rows[p]]) for p in chosen]
            show_images(images, titles, axes=axes)
            if note:
                figure.suptitle(note, fontsize=9)
        return figure


class _Board:
    """Widgets and what happens when they are moved."""

    def __init__(self, explorer: Explorer):
        import ipywidgets as w

        self.explorer, self._quiet = explorer, False
        wide = {"style": {"description_width": "initial"}, "layout": w.Layout(width="auto")}
        names = list(explorer.folders)
        self.run = w.Dropdown(options=names, description="run", **wide)
        self.other = w.Dropdown(options=["(none)"], description="compare with", **wide)
        self.finding = w.Dropdown(options=[], description="finding", **wide)
        self.point = w.Dropdown(options=[], description="go to operating point", **wide)
        self.slider = w.IntSlider(0, 0, 1, description="along the ROC curve", continuous_update=False, readout=False,
                                  style={"description_width": "initial"}, layout=w.Layout(width="98%"))
        self.numbers, self.moved, self.said = w.HTML(), w.HTML(), w.HTML()
        self.curve = w.Image(format="png", layout=w.Layout(width="430px", height="400px"))
        self.changed, self.errors = (w.Image(format="png", layout=w.Layout(width="100%", max_width="1060px")) for _ in "ab")
        self.order = w.Dropdown(options=list(_ORDERS), description="test images by", **wide)
        self.page = w.IntSlider(1, 1, 2, description="page", continuous_update=False, layout=w.Layout(width="420px"))
        self.pages = w.HTML()
        self.note = w.HTML()
        self.box = w.VBox([self.note, w.HBox([self.run, self.finding, self.point, self.other], layout=_wrap(w)), self.slider,
                           w.HBox([self.curve, self.numbers], layout=_wrap(w)), self.moved, self.changed,
                           w.HBox([self.order, self.pages, self.page], layout=_wrap(w)), self.errors, self.said])
        for widget, react in ((self.run, self._new_run), (self.finding, self._new_finding), (self.point, self._go_to_point),
                              (self.slider, self._slide), (self.other, self._new_other), (self.order, self._new_order),
                              (self.page, self._draw_errors)):
            widget.observe(functools.partial(self._react, react), names="value")
        self._react(self._new_run, None)

    def _react(self, react: Callable[[], None], _change) -> None:
        """Run an observer, unless a change was made by the program itself."""
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
        kept = self.finding.value
        usable = [n for n in self.test.classes if count[n] > 0] or list(self.test.classes)
        self.finding.options = [(f"{readable(n)} ({count[n]:,})", n) for n in usable]
        self.finding.value = kept if kept in usable else max(usable, key=count.get)
        points = list(self.metrics["test"]["operating"])
        kept = self.point.value
        self.point.options = [*points, _BY_HAND]
        self.point.value = kept if kept in points else self.point.options[0]
        alike = self.explorer.comparable
        same = [n for n in self.explorer.folders if n != self.run.value and alike[n] == alike[self.run.value]]
        kept = self.other.value
        self.other.options = ["(none)", *same]
        self.other.value = kept if kept in same else "(none)"
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
        here = self.walk.stand(target)
        self.numbers.value = self._table(here, stored)
        if self.order.value in ("missed findings", "false alarms"):
            self._new_order()
        self.curve.value = _png(self._roc(here))
        if before is None or before == target:
            self.moved.value = "<b>Images that change sides</b> as the slider moves stand here."
            self.changed.value, self.changed.layout.display = _BLANK, "none"
            return
        places = self.walk.between(before, target)
        way = "now called" if target > before else "no longer called"
        right = int(self.walk.y[places].sum())
        self.moved.value = (f"<b>{len(places):,} images change sides</b>: {way} {html.escape(readable(self.finding.value))}; "
                            f"{right:,} have it, {len(places) - right:,} have it not"
                            + (f". The {SHOWN} next to the new threshold:" if len(places) > SHOWN else ":"))
        self.changed.value = _png(self.explorer._row(self.run.value, self.walk, places))
        self.changed.layout.display = ""

    def _table(self, here, stored: dict | None) -> str:
        """The numbers at a point; at one that training chose, its own threshold and the intervals of the report."""
        limits = {k: Interval(*stored[f"{k}_interval"]) for k in ("sensitivity", "specificity", "precision", "f1")} \
            if stored else {}
        if not stored and enough_patients(self.test.patients) and np.isfinite(here.threshold):
            column = slice(self.c, self.c + 1)
            found = operating_resamples(self.test.labels[:, column], self.test.logits[:, column], self.test.patients,
                                        [here.threshold], resamples=300)
            limits = {k: interval(v[:, 0]) for k, v in found.items()}
        rows = "".join(f"<tr><td>{label}</td><td class='v'>{_share(getattr(here, k))}</td><td class='i'>{_span(limits.get(k))}"
                       "</td></tr>" for k, label in (("sensitivity", "sensitivity"), ("specificity", "specificity"),
                                                     ("precision", "precision"), ("f1", "F1")))
        value = stored["threshold"] if stored else here.threshold
        threshold = "above all" if value == float("inf") else f"p ≥ {_digits(value)}"
        return (f"<style>.walk td{{padding:2px 12px 2px 0}}.walk .v{{font-weight:600;text-align:right}}.walk .i{{color:#666}}"
                f".cm td,.cm th{{border:1px solid #bbb;padding:3px 12px;text-align:right}}</style>"
                f"<table class='walk'><tr><td>threshold</td><td class='v'>{threshold}</td><td></td></tr>{rows}</table><br>"
                f"<table class='cm'><tr><th></th><th>called</th><th>not called</th></tr><tr><th>has it</th><td>{here.tp:,}</td>"
                f"<td>{here.fn:,}</td></tr><tr><th>has it not</th><td>{here.fp:,}</td><td>{here.tn:,}</td></tr></table>"
                "<p style='color:#666'>in brackets: 95 % intervals over patients, the threshold held<br>"
                f"({1000 if stored else 300} resamples)</p>")

    def _roc(self, here) -> Figure:
        with plt.rc_context(RC):
            figure = Figure(figsize=(4.3, 4.0), layout="constrained")
            axis = figure.subplots()
            axis.plot([0, 1], [0, 1], color=GUIDE, lw=0.8)
            axis.plot(self.walk.fp / max(self.walk.fp[-1], 1), self.walk.tp / max(self.walk.tp[-1], 1), color=FIRST, lw=1.6,
                      label=f"{self.run.value}  {self.metrics['test']['auc'][self.finding.value]:.3f}")
            if self.other.value != "(none)":
                metrics, test = self.explorer.scored(self.other.value)
                walk = Walk(test.labels, test.logits, self.c)
                axis.plot(walk.fp / max(walk.fp[-1], 1), walk.tp / max(walk.tp[-1], 1), color="#222222", lw=1.2, ls="--",
                          label=f"{self.other.value}  {metrics['test']['auc'][self.finding.value]:.3f}")
            axis.plot(1 - here.specificity, here.sensitivity, "o", ms=9, color=SECOND, mec="white")
            axis.set(xlim=(-0.01, 1), ylim=(0, 1.01), xlabel="false positive rate (1 - specificity)",
                     ylabel="true positive rate (sensitivity)")
            axis.set_title(readable(self.finding.value))
            axis.legend(loc="lower right")
        return figure

    def _new_other(self, redraw: bool = True) -> None:
        compared = self.other.value != "(none)"
        orders = [*_ORDERS, *([_DIFFER] if compared else [])]
        if list(self.order.options) != orders:
            kept = self.order.value
            self.order.options = orders
            self.order.value = kept if kept in orders else orders[0]
        self.said.value = self._comparison() if compared else ""
        if redraw:
            self.curve.value = _png(self._roc(self.walk.stand(self.at)))
        self._new_order()

    def _comparison(self) -> str:
        key = self.run.value, self.other.value
        if key not in self.explorer._compared:
            table = compare(self.test, self.explorer.scored(self.other.value)[1])
            shown = with_intervals(table.rename(columns={"low": "difference low", "high": "difference high"}))
            self.explorer._compared[key] = (f"<p><b>{html.escape(verdict(table, *key))}</b></p><details><summary>by class"
                                            f"</summary>{shown.to_html(index=False, border=0)}</details>")
        return self.explorer._compared[key]

    def _new_order(self) -> None:
        if self.order.value in _ORDERS:
            self.places, self.theirs = self.walk.by_error(_ORDERS[self.order.value], self.at), None
        else:
            mine, theirs = aligned(self.test, self.explorer.scored(self.other.value)[1])
            self.theirs = expit(theirs.logits[:, self.c].astype(np.float64))
            rank = [np.argsort(np.argsort(p.logits[self.walk.rows, self.c])) for p in (mine, theirs)]
            self.places = np.argsort(-np.abs(rank[0] - rank[1]), kind="stable")
        count = -(-len(self.places) // SHOWN)
        self.page.value, self.page.max = 1, max(count, 2)  # a slider of one place breaks in the browser, so it is hidden
        self.page.layout.display = "" if count > 1 else "none"
        both = "; p of both runs" if self.theirs is not None else ""
        self.pages.value = f"{len(self.places):,} images on {count:,} pages{both}"
        self._draw_errors()

    def _draw_errors(self) -> None:
        start = (self.page.value - 1) * SHOWN
        self.errors.value = _png(self.explorer._row(self.run.value, self.walk, self.places[start:start + SHOWN],
                                                    other=self.theirs))


def _wrap(w):
    return w.Layout(flex_flow="row wrap", align_items="center")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


_BLANK = _png(Figure(figsize=(0.1, 0.1)))


def _digits(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"


def _share(value: float) -> str:
    return "undefined" if value != value else f"{value:.3f}"


def _span(limits) -> str:
    return f"({limits.low:.3f} to {limits.high:.3f})" if limits and limits.low == limits.low else ""
