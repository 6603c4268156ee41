"""The interactive explorer: walk along a ROC curve, see numbers and images change sides, and where a network looks.

Built from plain widgets with observers (``interact`` and ``Output`` hang at random under papermill). Without a person it draws
static pictures and makes no widget. matplotlib and torch are imported where they are first needed: the page is soon there.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy.special import expit

from charmlib.data.dataset import ImageReader
from charmlib.evaluation.groups import groups_of
from charmlib.evaluation.intervals import interval, operating_resamples
from charmlib.evaluation.operating import RATES
from charmlib.evaluation.runs import number, run_folders, run_names, valid_auc
from charmlib.evaluation.tables import MEAN, split_note, with_intervals
from charmlib.session import person_watches
from charmlib.viz.cards import STYLE, Card, cards, digits, text
from charmlib.viz.own_image import OwnImage
from charmlib.viz.page import table
from charmlib.viz.roc_svg import roc_svg
from charmlib.viz.style import readable
from charmlib.viz.walk import ORDERS, Walk

SHOWN = 8
"""Images in a row."""

_DIFFER = "the two runs differ most"
_BY_HAND, _NONE, _ALL = "(by hand)", "(none)", "all"
_ORDERS = dict(zip(("largest error", "missed (false negatives)", "false positives"), ORDERS))
_ABSENT = "<p role='status'><b>The images are not there</b>"
_KEY = ("<p>no evidence <span class='key'></span> the most in this image. A map has few cells, and nothing smaller shows. "
        "It is of the head alone: what a memory votes is in no map. Solid boxes are radiologists' for the finding, dashed ones "
        "for others.</p>")


class Explorer:
    """Look at finished runs.

    >>> Explorer(["runs/demo"], ImageReader(), ask).show()          # doctest: +SKIP

    Parameters
    ----------
    runs : folders of runs, or of grids, of which all cells are taken
        The best by validation comes first, those without a validation part last.
        A folder without finished runs raises FileNotFoundError.
    reader : ImageReader, optional
        Finds the images. Without it, or if they are not there, the place of an image is blank.
    ask : the module :mod:`charmlib.training.ask`, optional
        Asks a run's network for heat maps and opinions. Without it there are none.

    Attributes
    ----------
    folders : dict
        Name -> RunFolder.
    """

    def __init__(self, runs: Sequence[str | Path], reader: ImageReader | None = None, ask=None):
        found = run_folders(runs)
        self.folders = dict(sorted(zip(run_names(found), found), key=lambda item: (
            item[1].metrics["valid"] is None, -np.nan_to_num(valid_auc(item[1].metrics)))))
        self.reader, self.ask = reader, ask
        self.image, self.comparison = functools.lru_cache(256)(self._image), functools.cache(self._compare)
        self.boxes = functools.cache(self._boxes)
        self.heats: dict[tuple[str, str, int, str], dict] = {}
        """(run, finding, stride, image id) -> ``heat`` and ``margin``, of all that were asked for."""

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
        import matplotlib.pyplot as plt

        for shown in self.static():
            display(shown)
        plt.close("all")

    def static(self) -> list:
        """Interval bands, counts at the operating point (if it has one) and the worst errors of the first run."""
        from IPython.display import HTML

        from charmlib.evaluation.score import evaluate_run
        from charmlib.evaluation.tables import point_note
        from charmlib.viz.curves import plot_roc_bands
        from charmlib.viz.per_class import plot_counts

        name = next(iter(self.folders))
        metrics, test = evaluate_run(self.folders[name])
        note = split_note(metrics)
        best = max(test.positives, key=test.positives.get)
        walk = Walk(test.labels, test.logits, test.classes.index(best))
        operating = metrics["test"]["operating"].get("youden", {})
        row = operating.get(best)
        at = walk.at_threshold(row["threshold"]) if row else int(walk.stations()[len(walk.stations()) // 2])
        shown = [plot_roc_bands(test, metrics["test"], title=name, note=note)]
        if operating:
            shown.append(plot_counts(operating, title=name, note=f"{note}; {point_note(metrics['test'], 'youden')}"))
        end = text(f"at p ≥ {digits(walk.point(at)['threshold'])}. {note}")
        for order in ORDERS[1:]:
            worst = cards(self.cards(name, walk, walk.by_error(order, at)[:SHOWN], best), order.replace(" ", "-"))
            shown.append(HTML(f"{STYLE}<p>{text(readable(best))}, worst {order} {end}</p>{worst}"))
        return shown

    def widget(self):
        """The widgets, one box that can be displayed."""
        return _Board(self).box

    def cards(self, name: str, walk: Walk, positions: np.ndarray, finding: str, other: np.ndarray | None = None, *,
              stride: int = 0) -> list[Card]:
        """The images at some positions of a walk: label and probability of each, and the probability in ``other`` (n_test,).

        With a ``stride`` also the heat maps that are in ``heats``.
        """
        test, boxes = self.folders[name].test, self.boxes(name)
        out = []
        for p in positions:
            row = walk.rows[p]
            lines = [f"{readable(finding)}: {'positive' if walk.y[p] else 'negative'}", f"p {digits(walk.probability[p])}"
                     + (f", {digits(other[row])}" if other is not None else "")]
            found = self.heats.get((name, finding, stride, str(test.ids[row])), {})
            out.append(Card(self.image(name, str(test.ids[row])), Path(test.ids[row]).stem, lines, readable(finding),
                            boxes.get(row, ()), **found))
        return out

    def heat(self, name: str, finding: str, stride: int, image_id: str) -> None:
        """Ask the network of a run for a heat map of one of its test images, unless that is in ``heats``.

        Raises OSError, ValueError or KeyError if weights or image are not there, for an ensemble and a stride without map.
        """
        if (key := (name, finding, stride, image_id)) not in self.heats:
            run = self.folders[name]
            told = self.ask.heat(run.path, self.reader.path(run.metrics, image_id), finding, stride)
            self.heats[key] = {"heat": told["heat"], "margin": told["margin"]}

    def _image(self, name: str, image_id: str | None) -> np.ndarray | None:
        return self.reader and self.reader.find(self.folders[name].metrics, image_id)

    def _boxes(self, name: str) -> dict[int, list[tuple]]:
        """Row of the test part -> its boxes as of a :class:`charmlib.viz.cards.Card`."""
        run, out = self.folders[name], {}
        if self.reader:
            found = self.reader.boxes(run.metrics, run.test.ids.tolist(), run.test.labels)
            for row, _, finding, *box in found.itertuples(index=False):
                out.setdefault(row, []).append((readable(finding), *box))
        return out

    def _compare(self, first: str, second: str) -> str:
        from charmlib.evaluation.compare import compare, verdict

        found = compare(self.folders[first].test, self.folders[second].test)
        out = (f"<p><b>{text(verdict(found, first, second))}</b> By class: {text(second)} less {text(first)} on the same "
               "images, with 95 % intervals over patients; the largest differences come first.</p>")
        found["beyond chance"] = np.select([found["low"] > 0, found["high"] < 0], ["higher", "lower"], "")
        found["class"] = found["class"].map(readable)
        names = {"first": first, "second": second, "low": "difference low", "high": "difference high"}
        for figure, rows in found.drop(columns=["agree", "undefined"]).groupby("figure", sort=False):
            order = np.lexsort([-rows["difference"].abs(), rows["class"] != MEAN])
            shown = table(with_intervals(rows.drop(columns="figure").iloc[order].rename(columns=names)))
            out += f"<details{' open' * (figure == 'AUC')}><summary>{figure} by class</summary>{shown}</details>"
        return out


class _Board:
    """The widgets and their observers."""

    def __init__(self, explorer: Explorer):
        import ipywidgets as w

        self.explorer, self._quiet, self._lock = explorer, False, threading.Lock()
        self.pool = ThreadPoolExecutor(1)  # networks are asked beside the kernel's own thread, one question after another
        self._wanted, self.own = None, OwnImage(explorer, self.pool)
        initial, wrap = {"description_width": "initial"}, w.Layout(flex_flow="row wrap", align_items="center")

        def choice(**how):  # each with a layout of its own, since some are hidden
            return w.Dropdown(style=initial, layout=w.Layout(width="auto"), **how)

        self.run = choice(options=list(explorer.folders), description="run")
        self.other = choice(options=[_NONE], description="compare with")
        self.finding = choice(options=[], description="finding")
        self.point = choice(options=[], description="operating point")
        self.slider = w.IntSlider(0, 0, 1, description="along the ROC curve", continuous_update=False, readout=False,
                                  style=initial, layout=w.Layout(width="98%"))
        self.note, self.curve, self.numbers, self.moved, self.changed, self.pages, self.errors, self.said, self.key, \
            self.shade = (w.HTML() for _ in range(10))
        self.order = choice(options=list(_ORDERS.items()), description="test images by")
        self.filters = {column: choice(options=[_ALL], description=column) for column in ("view", "sex", "age")}
        self.page = w.IntSlider(1, 1, 2, description="page", continuous_update=False, layout=w.Layout(width="420px"))
        self.heat = w.Checkbox(False, description="heat map of the finding", indent=False, layout=w.Layout(width="auto"),
                               disabled=not (explorer.reader and explorer.ask))
        self.stride = choice(options=[32, 16, 8, 4], description="pixels a cell of it")
        self.opacity = w.FloatSlider(0.65, min=0, max=1, step=0.05, description="opacity of heat maps", style=initial,
                                     readout_format=".2f", layout=w.Layout(width="380px"))
        self.curve.layout, self.numbers.layout = w.Layout(flex="0 1 430px", min_width="300px"), w.Layout(flex="1 1 300px")
        self.box = w.VBox([
            self.note, w.HBox([self.run, self.finding, self.point, self.other], layout=wrap), self.slider,
            w.HBox([self.curve, self.numbers], layout=w.Layout(flex_flow="row wrap")), self.said, self.moved, self.changed,
            w.HTML("<h2>Test images</h2>"), w.HBox([self.order, *self.filters.values(), self.page], layout=wrap),
            w.HBox([self.heat, self.stride, self.opacity], layout=wrap), self.key, self.pages, self.errors,
            self.own.box, self.shade])
        self.box.add_class("charm")
        for react, *widgets in ((self._new_run, self.run), (self._new_finding, self.finding), (self._go_to_point, self.point),
                                (self._slide, self.slider), (self._new_other, self.other), (self._draw, self.page, self.heat),
                                (self._new_order, self.order, *self.filters.values()), (self._new_stride, self.stride),
                                (self._shade, self.opacity)):
            for widget in widgets:
                widget.observe(functools.partial(self._react, react), names="value")
        self._shade()
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
        self.folder = self.explorer.folders[self.run.value]
        self.metrics, self.test = self.folder.metrics, self.folder.test
        drawn = "<b>Drawn phantoms, not radiographs.</b> " if self.metrics["data"]["drawn"] else ""
        self.note.value = f"{STYLE}{drawn}{text(split_note(self.metrics))}. Research use only."
        count = self.test.positives
        usable = [name for name, positives in count.items() if positives] or list(count)
        _offer(self.finding, [(f"{readable(name)} ({count[name]:,})", name) for name in usable],
               max(usable, key=lambda name: (name != self.metrics["normal_class"], count[name])))
        points = [*self.metrics["test"]["operating"], _BY_HAND]
        _offer(self.point, points, points[0])
        _offer(self.other, [_NONE, *self.explorer.comparable(self.run.value)], _NONE)
        self.groups = dict(groups_of(self.test))
        for column, widget in self.filters.items():
            _offer(widget, [_ALL, *(g.removeprefix(f"{column} ") for g in self.groups if g.startswith(f"{column} "))], _ALL)
            widget.layout.display = "" if len(widget.options) > 1 else "none"
        self._new_finding()

    def _new_finding(self) -> None:
        self.errors.value = self.changed.value = ""  # before anything of the new finding is there
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
        here = stored or self.walk.point(target)
        self.threshold, self.numbers.value = here["threshold"], self._table(here, stored is not None)
        self._draw_curve()
        self.strip = np.empty(0, int)
        if before is None or before == target:
            self.moved.value = "<b>Images that change sides</b> as the slider moves appear here."
        else:
            self.strip = positions = self.walk.between(before, target)
            way = "now" if target > before else "no longer"
            right = int(self.walk.y[positions].sum())
            self.moved.value = (f"<b>{len(positions):,} images change sides</b>: {way} called "
                                f"{text(readable(self.finding.value))}; {right:,} positives, {len(positions) - right:,} "
                                f"negatives" + (f". The {SHOWN} next to the new threshold:" if len(positions) > SHOWN else ":"))
        self.changed.layout.display = "" if len(self.strip) else "none"
        if before is not None:  # else the finding is new, and its images are listed next
            self._new_order()
            self._ask_own()

    def _table(self, here: dict, stored: bool) -> str:
        """The numbers at the point; at an operating point with its stored threshold and the intervals of the report."""
        if not stored and np.isfinite(here["threshold"]):
            column = slice(self.c, self.c + 1)
            found = operating_resamples(self.test.labels[:, column], self.test.logits[:, column], self.test.patients,
                                        [here["threshold"]], resamples=300)
            here |= {f"{rate}_interval": interval(drawn[:, 0]) for rate, drawn in found.items()}
        rows = "".join(_row(rate, number(here[rate]), here.get(f"{rate}_interval")) for rate in RATES)
        threshold = f"p ≥ {digits(here['threshold'])}" if np.isfinite(here["threshold"]) else "above all"
        return (f"<table class='walk'><tr><td>threshold</td><td class='v'>{threshold}</td><td></td></tr>{rows}</table>"
                "<br><table class='cm'><tr><th></th><th>predicted positive</th><th>predicted negative</th></tr>"
                f"<tr><th>positive</th><td>{here['tp']:,}</td><td>{here['fn']:,}</td></tr>"
                f"<tr><th>negative</th><td>{here['fp']:,}</td><td>{here['tn']:,}</td></tr></table>"
                "<p>in brackets: 95 % intervals over patients at a fixed threshold<br>"
                f"({1000 if stored else 300} resamples)</p>")

    def _draw_curve(self) -> None:
        walks = {}
        for name in (self.run.value, self.other.value)[:1 + (self.other.value != _NONE)]:
            run = self.explorer.folders[name]
            auc = number(run.metrics["test"]["auc"][self.finding.value])
            walks[f"{auc:.3f}  {name}"] = Walk(run.test.labels, run.test.logits, self.c)
        self.curve.value = roc_svg(walks, readable(self.finding.value), self.walk.point(self.at))

    def _new_other(self, redraw: bool = True) -> None:
        compared = self.other.value != _NONE
        _offer(self.order, [*_ORDERS.items(), *[(_DIFFER, _DIFFER)] * compared], ORDERS[0])
        if redraw:
            self._draw_curve()
        self._new_order()
        self._ask_own()
        self.said.value = self.explorer.comparison(self.run.value, self.other.value) if compared else ""

    def _new_order(self) -> None:
        self.theirs = None
        if self.order.value in ORDERS:
            positions = self.walk.by_error(self.order.value, self.at)
        else:
            from charmlib.evaluation.compare import aligned

            mine, theirs = aligned(self.test, self.explorer.folders[self.other.value].test)
            self.theirs = expit(theirs.logits[:, self.c].astype(np.float64))
            rank = [np.argsort(np.argsort(p.logits[self.walk.rows, self.c])) for p in (mine, theirs)]
            positions = np.argsort(-np.abs(rank[0] - rank[1]), kind="stable")
        chosen = [f"{column} {widget.value}" for column, widget in self.filters.items() if widget.value != _ALL]
        keep = np.logical_and.reduce([np.ones(len(self.test.ids), bool), *(self.groups[group] for group in chosen)])
        self.positions = positions[keep[self.walk.rows[positions]]]
        count = -(-len(self.positions) // SHOWN)
        self.page.value, self.page.max = 1, max(count, 2)  # a slider with a single value breaks in the browser: it is hidden
        self.page.layout.display = "" if count > 1 else "none"
        at = "" if self.order.value not in ORDERS[1:] else ", with nothing called" if np.isinf(self.threshold) else (
            f", at p ≥ {digits(self.threshold)}, the operating point {self.point.value}")
        words = f"{readable(self.finding.value)}: {len(self.positions):,} images on {count:,} pages{at}"
        both = [] if self.theirs is None else ["p of both runs"]
        self.pages.value = f"<p role='status'>{text(', '.join([words, *chosen, *both]))}</p>"
        self._draw()

    def _draw(self) -> None:
        """The images of the page and those that change sides; maps that are not there yet come later."""
        start, name, finding = (self.page.value - 1) * SHOWN, self.run.value, self.finding.value
        shown = self.strip[:SHOWN], self.positions[start:start + SHOWN]
        ids = [str(self.test.ids[self.walk.rows[p]]) for p in np.concatenate(shown)]
        with self._lock:
            self._wanted = wanted = (name, finding, self.walk, shown, self.theirs, self.heat.value * self.stride.value)
            self._render()
            self.key.value = self._missing(ids)
        if self.heat.value and ids and not self.key.value.startswith(_ABSENT):
            self.key.value = "<p role='status'>the network looks at these images ...</p>"
            self.pool.submit(self._ask_heat, wanted, ids)

    def _render(self) -> None:
        name, finding, walk, (strip, page), theirs, stride = self._wanted
        for widget, positions, other in ((self.changed, strip, None), (self.errors, page, theirs)):
            widget.value = cards(self.explorer.cards(name, walk, positions, finding, other, stride=stride),
                                 f"c{id(widget):x}") if len(positions) else ""

    def _missing(self, ids: list[str]) -> str:
        """That none of these images is there; '' if one is."""
        if not ids or any(self.explorer.image(self.run.value, i) is not None for i in ids):
            return ""
        root = self.explorer.reader.root(self.metrics) if self.explorer.reader else "no folder"
        return (f"{_ABSENT} (looked for in {text(root)}), so there are no pictures and no heat maps of "
                "them. Name their folder with <code>--data-root</code>.</p>")

    def _ask_heat(self, wanted: tuple, ids: list[str]) -> None:
        """In the pool: the maps that are missing, unless another finding, run or page is wanted by now."""
        try:
            for image_id in ids:
                if self._wanted is not wanted:
                    return
                if self.explorer.image(wanted[0], image_id) is not None:
                    self.explorer.heat(*wanted[:2], wanted[-1], image_id)
            words = ""
        except Exception as error:  # a thread's own would reach nobody
            words = f"<p role='status'><b>No heat map</b>: {text(error)}</p>"
        with self._lock:
            if self._wanted is wanted:
                self._render()
                self.key.value = words or _KEY

    def _new_stride(self) -> None:
        self._draw()
        self._ask_own()

    def _ask_own(self) -> None:
        points = [point for point in (self.point.value, *self.point.options) if point != _BY_HAND]
        self.own.ask(self.run.value, self.finding.value, next(iter(points), "youden"), self.stride.value)

    def _shade(self) -> None:
        self.shade.value = f"<style>.charm{{--heat:{self.opacity.value:.2f}}}</style>"


def _offer(dropdown, options: Sequence, otherwise: str) -> None:
    """New options, values or (label, value); the value stays if it is among them, else it becomes ``otherwise``."""
    kept = dropdown.value
    dropdown.options = list(options)
    dropdown.value = kept if kept in (option[1] if isinstance(option, tuple) else option for option in options) else otherwise


def _row(rate: str, value: float, limits: Sequence[float] | None) -> str:
    span = "" if limits is None or np.isnan(number(limits[0])) else f"({limits[0]:.3f} to {limits[1]:.3f})"
    return (f"<tr><td>{rate.replace('f1', 'F1')}</td><td class='v'>{'undefined' if np.isnan(value) else f'{value:.3f}'}</td>"
            f"<td class='i'>{span}</td></tr>")
