"""A run's pictures, and its ``report.html``."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from charmlib.data.dataset import ImageReader
from charmlib.evaluation import boxes, few, tables
from charmlib.evaluation.enrichment import enrichment_note, enrichment_table
from charmlib.evaluation.published import beside_published
from charmlib.evaluation.runs import Predictions, RunFolder, number
from charmlib.evaluation.tables import with_intervals
from charmlib.files import write_csv
from charmlib.param_sources import changed
from charmlib.params import PARAMS, missing_need
from charmlib.viz import page
from charmlib.viz.bank_content import plot_enrichment
from charmlib.viz.cooccurrence import plot_cooccurrence
from charmlib.viz.curves import plot_precision_recall, plot_reliability, plot_roc, plot_roc_bands
from charmlib.viz.errors import plot_errors, worst_errors
from charmlib.viz.heat import plot_boxed
from charmlib.viz.history import plot_history
from charmlib.viz.looks import plot_looks
from charmlib.viz.per_class import plot_counts, plot_per_class
from charmlib.viz.retrieved import plot_explanation

PANELS = 40  # classes that fit on a picture
LOOKS, MEMORY, PATHS = "Where the network looks", "What the memory answers", "The two paths"  # of single images


def rarest_first(metrics: Mapping, predictions: Predictions) -> tuple[dict, Predictions]:
    """Metrics and predictions with the classes in the order of a page: by rising prevalence in the training part."""
    order = sorted(predictions.classes, key=lambda c: number(metrics["train_prevalence"].get(c), 2))

    def sort(found):  # whatever has classes as keys, or lists some
        if isinstance(found, Mapping):
            return {c: sort(found[c]) for c in sorted(found, key=lambda c: order.index(c) if c in order else -1)}
        return [c for c in order if c in found] if isinstance(found, list) and found and {*found} <= {*order} else found

    return {**metrics, "test": sort(metrics["test"])}, predictions.of(order)


def settings(params: Mapping, of: str) -> str:
    """The parameters that act and differ from their defaults, with what they are, behind a click."""
    rows = [{"parameter": name, "value": str(value), "what it is": PARAMS[name].reason}
            for name, value in changed(params).items()
            if name in PARAMS and PARAMS[name].hashed and not missing_need(name, params)]
    return page.folded(f"Settings of {of}: {len(rows)} differ from the defaults", page.table(pd.DataFrame(rows), "words"))


def score_words(metrics: Mapping) -> str:
    """A run's mean AUC on the test part with its interval, in words."""
    part = metrics["test"]
    low, high, _ = part["intervals"]["mean_auc"]
    limits = "" if number(low) != number(low) else f" (95 % {low:.3f} to {high:.3f})"
    return f"mean AUC {number(part['mean_auc']):.3f}{limits} on the test part"


def run_pictures(metrics: Mapping, predictions: Predictions, *, point: str = "youden") -> dict[str, object]:
    """Title -> figure: all pictures of a scored run, finished (with ``cell`` in its metrics) or not.

    There are no counts for a run without this operating point, and no enrichment without a bank. Of more than 40 classes,
    the rarest 40 with positives are drawn.
    """
    metrics, predictions = rarest_first(metrics, predictions)
    part, note, name = metrics["test"], tables.split_note(metrics), metrics.get("cell", "")
    if len(predictions.classes) > PANELS:
        rarest = sorted(predictions.classes, key=lambda c: (predictions.positives[c] == 0, predictions.positives[c]))[:PANELS]
        shown = [c for c in predictions.classes if c in rarest]
        note = f"the {PANELS} rarest of {len(predictions.classes)} classes; {note}"
        predictions, part = predictions.of(shown), {**part, "auc": {c: part["auc"][c] for c in shown}}
    how = {"title": name, "note": note}
    pictures = {"ROC curves": plot_roc(predictions, **how),
                "ROC curves with interval bands": plot_roc_bands(predictions, part, point=point, **how),
                "Precision and recall": plot_precision_recall(predictions, part, **how),
                "AUC by class": plot_per_class({**metrics, "test": part}, **how)}
    if counts := {c: row for c, row in part["operating"].get(point, {}).items() if c in predictions.classes}:
        pictures[f"Counts at the operating point '{point}'"] = plot_counts(
            counts, title=name, note=f"{note}; {tables.point_note(part, point)}")
    pictures["Calibration"] = plot_reliability(predictions, part["calibration"].get("scaled", {}).get("temperature"), **how)
    pictures["Co-occurrence of findings (test part)"] = plot_cooccurrence(predictions.labels, predictions.classes, note=note)
    if enriched := metrics["bank"] and metrics["bank"]["enrichment"]:
        pictures["Enrichment of the memory bank"] = plot_enrichment(
            enriched, title=name, note=tables.split_note(metrics, "train"))
    return pictures


def encoded_pictures(metrics: Mapping, predictions: Predictions, *, point: str = "youden") -> dict[str, bytes]:
    """Title -> PNG of :func:`run_pictures`, drawn once for the notebook and its report."""
    pictures = {}
    for title, figure in run_pictures(metrics, predictions, point=point).items():
        pictures[title] = page.png(figure)
        plt.close(figure)
    return pictures


def explained_cases(run, metrics: Mapping, predictions: Predictions) -> dict[str, bytes]:
    """Title -> PNG, as far as a scored :class:`charmlib.training.run.Run` has them: where its network looks in images with
    boxes, what the memory answers three test images with, and what two paths saw of six."""
    note = tables.split_note(metrics)
    drawn = {LOOKS: plot_boxed(run.folder, metrics, predictions, ImageReader(), note=note)}
    if run.bank.bank is not None:
        drawn[MEMORY] = plot_explanation([run.bank.explain(image) for image in run.bank.cases(3)], note=note)
    if hasattr(run.net, "local_path"):
        drawn[PATHS] = plot_looks(run.looks(run.bank.cases(6)), note=note)
    pictures = {title: page.png(figure) for title, figure in drawn.items() if figure}
    plt.close("all")
    return pictures


def write_run_report(path: str | Path, metrics: Mapping, predictions: Predictions, pictures: Mapping,
                     run: RunFolder | None = None) -> Path:
    """Write a run's ``report.html``: tables and pictures on one self-contained page; returns its path.

    ``pictures`` are those of :func:`run_pictures`, as figures or the bytes of PNGs. ``run``, by default the page's folder, has
    the training curves. The worst errors are shown where the images can be read.
    """
    run, left = run or RunFolder(Path(path).parent), dict(pictures)
    metrics, predictions = rarest_first(metrics, predictions)
    part, name, note = metrics["test"], metrics.get("cell") or Path(path).resolve().parent.name, tables.split_note(metrics)
    published, remark = beside_published({**metrics, "cell": name})
    worst = worst_errors(predictions)
    reader = ImageReader()
    figures = {"Worst errors": plot_errors(worst, reader, metrics, note=note)}
    if LOOKS not in left:
        figures[LOOKS] = plot_boxed(run, metrics, predictions, reader, note=note)
    if run.history_file.is_file():
        figures["Training"] = plot_history(pd.read_csv(run.history_file), monitor=metrics["params"]["monitor"],
                                           note=tables.split_note(metrics, "valid" if metrics["valid"] else "train"))
    for title, figure in figures.items():
        if figure:
            left[title] = page.png(figure)
            plt.close(figure)

    def shown(*beginnings: str) -> list[str]:
        return page.pictures({title: left.pop(title) for title in list(left) if title.startswith(beginnings)})

    parts = [page.paragraph(f"{name}: {score_words(metrics)}.", "lead"),
             page.paragraph(f"{note}. {tables.origin_note(metrics)}.", ""),
             *(page.paragraph(f"{text[0].upper()}{text[1:]}.") for text in _members(metrics)),
             *([f"<p>{page.link('All cells of the grid', '../report.html')}, this cell's "
                f"{page.link('files', '.')}</p>"] if (run / "../grid.yaml").is_file() else []),
             settings(metrics["params"], name), page.paragraph(page.ORDER), *shown("Training", "ROC", "Precision", "AUC"),
             page.heading("Scores on the whole test part"),
             page.paragraph(f"95 % intervals by bootstrap over {tables.clusters(metrics['split'])}; 'undefined' is the share "
                            "of resamples that lack positives or negatives of a class, which are left out of its interval."),
             page.table(with_intervals(tables.class_table(part, predictions.positives)), "first"),
             page.paragraph(". ".join(filter(None, (tables.groups_note(part), few.note(part["intervals"]["patients"]), ""))))]
    if len(by_group := predictions.by_group):
        parts += [page.heading("By view, sex and age group"), page.table(with_intervals(by_group), "words")]
    parts += shown("Worst errors")
    for case in worst["missed"][:1]:
        parts.append(page.paragraph(
            f"Where the network sees the finding: `python -m charmlib explain {run.path.resolve().name} PATH/{case['image']} "
            f"--finding {case['class']}` draws its heat map and the terms of the logit."))
    parts += shown(LOOKS)
    if run.boxes_file.is_file():
        parts += [page.heading("Heat maps against radiologists' boxes"), page.paragraph(boxes.HOW),
                  page.table(with_intervals(boxes.box_table(run.boxes_file)), "words")]
    parts += [*shown(MEMORY, PATHS), *shown("Counts")]
    for point in part["operating"]:
        parts += [page.heading(f"Operating point '{point}'"),
                  page.paragraph(f"{tables.point_note(part, point)}; thresholds stay fixed in the resamples. An interval of "
                                 "zero width at 0 or 1 means that all images are on one side of the threshold, not certainty."),
                  page.table(with_intervals(tables.operating_table(part, point)), "notes")]
    if not part["operating"]:
        parts += [page.heading("Operating points"), page.paragraph(
            "None: the run was trained without a validation part (valid_fraction 0), so there was nothing to choose "
            "thresholds, a temperature or the best epoch on. It is never ranked beside runs that have one.")]
    parts += [*shown("Calibration"), page.table(with_intervals(tables.calibration_table(part), 4), "words"), *shown("Co-occ"),
              page.heading("Comparison with published results"), page.paragraph(remark),
              *([] if published is None else [page.table(with_intervals(published, 4), "words")])]
    if enriched := metrics["bank"] and metrics["bank"]["enrichment"]:
        parts += [*shown("Enrichment"), page.paragraph(enrichment_note(enriched)),
                  page.table(with_intervals(enrichment_table(enriched), 2))]
    return page.write_page(path, f"Run {name}", parts + page.pictures(left), drawn=metrics["data"]["drawn"])


def write_evaluation(folder: str | Path, metrics: Mapping, predictions: Predictions, point: str,
                     run: RunFolder | None = None) -> Path:
    """Write ``report.html`` and ``per_class.csv`` of a ``run`` into a folder, by default its own; returns the page's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    calls = tables.operating_table(metrics["test"], point)
    table = tables.class_table(metrics["test"], predictions.positives).merge(calls, on="class", how="left",
                                                                             suffixes=("", " at the point"))
    write_csv(folder / "per_class.csv", tables.with_origin(table, metrics).assign(
        run=metrics["cell"], point=point if len(calls) else pd.NA))
    return write_run_report(folder / "report.html", metrics, predictions, encoded_pictures(metrics, predictions, point=point),
                            run)


def evaluation_text(metrics: Mapping, predictions: Predictions, point: str) -> str:
    """The tables of a run for a terminal: scores, counts at an operating point, calibration."""
    part = metrics["test"]
    by_group, calls, undefined = predictions.by_group, tables.operating_table(part, point), ", ".join(part["undefined"])
    return "\n".join([
        f"{metrics['cell']}: {tables.split_note(metrics)}; {tables.origin_note(metrics)}", *_members(metrics),
        with_intervals(tables.class_table(part, predictions.positives)).to_string(index=False),
        *([f"left out of the means, having no positives or no negatives: {undefined}"] if undefined else []),
        *([f"\nby group:\n{with_intervals(by_group).to_string(index=False)}\n"] if len(by_group) else []),
        tables.groups_note(part), few.note(part["intervals"]["patients"]),
        f"\n{tables.point_note(part, point)}" + (":" if len(calls) else ""),
        *([with_intervals(calls).to_string(index=False)] if len(calls) else []),
        "\ncalibration:", with_intervals(tables.calibration_table(part), 4).to_string(index=False)])


def _members(metrics: Mapping) -> list[str]:
    how = metrics.get("merge", "mean")
    return [f"{how} of the probabilities of {', '.join(metrics['members'])}"] if "members" in metrics else []
