"""A run's pictures, and its ``report.html``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from charmlib.evaluation.enrichment import enrichment_note, enrichment_table
from charmlib.evaluation.published import beside_published
from charmlib.evaluation.runs import Predictions
from charmlib.evaluation.tables import (
    calibration_table,
    class_table,
    groups_note,
    operating_table,
    origin_note,
    point_note,
    split_note,
    with_intervals,
    with_origin,
)
from charmlib.files import write_whole
from charmlib.viz import page
from charmlib.viz.bank import plot_enrichment
from charmlib.viz.calibration import plot_calibration
from charmlib.viz.cooccurrence import plot_cooccurrence
from charmlib.viz.counts import plot_counts
from charmlib.viz.per_class import plot_per_class
from charmlib.viz.precision_recall import plot_precision_recall
from charmlib.viz.roc import plot_roc, plot_roc_bands


def run_pictures(metrics: Mapping, predictions: Predictions, *, point: str = "youden") -> dict[str, object]:
    """Title -> figure: all that is drawn of a scored run. ``metrics`` needs not be finished (``cell`` may be missing).

    Without the counts for a run that has no operating point."""
    part, note, name = metrics["test"], split_note(metrics), metrics.get("cell", "")
    bank = (metrics.get("bank") or {}).get("enrichment")
    counts = {f"Counts at the operating point '{point}'": plot_counts(
        part["operating"][point], title=name, note=f"{note}; {point_note(part, point)}")} if point in part["operating"] else {}
    temperature = part["calibration"].get("scaled", {}).get("temperature")
    return {
        "ROC curves": plot_roc(predictions, title=name, note=note),
        "ROC curves with interval bands": plot_roc_bands(predictions, part, point=point, title=name, note=note),
        "Precision and recall": plot_precision_recall(predictions, part, title=name, note=note),
        "AUC by class": plot_per_class(metrics, title=name, note=note),
        **counts,
        "Calibration": plot_calibration(predictions, temperature, title=name, note=note),
        "Findings that come together (test part)": plot_cooccurrence(predictions.labels, predictions.classes, note=note),
        **({"What the memory bank holds": plot_enrichment(bank, title=name, note=note)} if bank else {}),
    }


def encoded_pictures(metrics: Mapping, predictions: Predictions) -> dict[str, bytes]:
    """Title -> PNG of :func:`run_pictures`: drawn once, for the notebook and its report."""
    pictures = {}
    for title, figure in run_pictures(metrics, predictions).items():
        pictures[title] = page.png(figure)
        plt.close(figure)
    return pictures


def write_run_report(path: str | Path, metrics: Mapping, predictions: Predictions, pictures: Mapping | None = None) -> Path:
    """Write a run's ``report.html``: tables and pictures on one page that needs nothing else; returns its path.

    ``pictures`` are those of :func:`run_pictures` where they have been drawn already, as figures or the bytes of PNGs.
    """
    pictures = run_pictures(metrics, predictions) if pictures is None else pictures
    part, name = metrics["test"], metrics.get("cell") or Path(path).resolve().parent.name
    published, remark = beside_published({**metrics, "cell": name})
    shown = with_intervals(class_table(part, predictions.positives))
    parts = [page.paragraph(f"{split_note(metrics)}. {origin_note(metrics)}.", ""),
             page.heading("Scores on the whole test part"),
             page.paragraph("95 % intervals by bootstrap over patients; 'undefined' is the share of resamples that lack "
                            "positives or negatives of a class, which are left out of its interval."),
             page.table(shown, "first"), page.paragraph(f"{groups_note(part)}.")]
    if "members" in metrics:
        parts.insert(1, page.paragraph(f"Mean of the probabilities of {', '.join(metrics['members'])}."))
    for point in part["operating"]:
        parts += [page.heading(f"Operating point '{point}'"),
                  page.paragraph(f"{point_note(part, point)}; thresholds stay fixed in the resamples. Limits "
                                 "without width at 0 or 1 only say that no resample can show what the sample lacks."),
                  page.table(with_intervals(operating_table(part, point)))]
    if not part["operating"]:
        parts += [page.heading("Operating points"), page.paragraph(
            "None: the run was trained without a validation part (valid_fraction 0), so there was nothing to choose "
            "thresholds, a temperature or the best epoch on. It is never ranked beside runs that have one.")]
    parts += [page.heading("Calibration"), page.table(with_intervals(calibration_table(part), 4), "words"),
              page.heading("Beside published figures"), page.paragraph(remark)]
    if published is not None:
        parts.append(page.table(with_intervals(published, 4), "words"))
    if bank := (metrics.get("bank") or {}).get("enrichment"):
        parts += [page.heading("Does the bank hold rare findings?"), page.paragraph(enrichment_note(bank)),
                  page.table(with_intervals(enrichment_table(bank), 2))]
    for title, figure in pictures.items():
        parts += [page.heading(title), page.picture(figure, title)]
    return page.write_page(path, f"Run {name}", parts, drawn=metrics["data"]["drawn"])


def write_evaluation(folder: str | Path, metrics: Mapping, predictions: Predictions, point: str) -> Path:
    """Write ``report.html`` and ``per_class.csv`` of a run into a folder; returns the page's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scores = class_table(metrics["test"], predictions.positives)
    calls = operating_table(metrics["test"], point)
    table = with_origin(scores.merge(calls, on="class", how="left", suffixes=("", " at the point")), metrics)
    table = table.assign(run=metrics["cell"], point=point if len(calls) else pd.NA)
    write_whole(folder / "per_class.csv", lambda temporary: table.to_csv(temporary, index=False))
    pictures = run_pictures(metrics, predictions, point=point)
    page_path = write_run_report(folder / "report.html", metrics, predictions, pictures)
    for figure in pictures.values():
        plt.close(figure)
    return page_path


def evaluation_text(metrics: Mapping, predictions: Predictions, point: str) -> str:
    """The tables of a run for a terminal: scores, counts at an operating point, calibration."""
    part = metrics["test"]
    members = [f"mean of the probabilities of {', '.join(metrics['members'])}"] if "members" in metrics else []
    left_out = [f"left out of the means, having no positives or no negatives: {', '.join(part['undefined'])}"] \
        if part["undefined"] else []
    calls = operating_table(part, point)
    return "\n".join([f"{metrics['cell']}: {split_note(metrics)}; {origin_note(metrics)}", *members,
                      with_intervals(class_table(part, predictions.positives)).to_string(index=False), *left_out,
                      groups_note(part), f"\n{point_note(part, point)}" + (":" if len(calls) else ""),
                      *([with_intervals(calls).to_string(index=False)] if len(calls) else []), "\ncalibration:",
                      with_intervals(calibration_table(part), 4).to_string(index=False)])
