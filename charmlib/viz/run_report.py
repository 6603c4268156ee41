"""A run's pictures, and its ``report.html``."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from charmlib.evaluation.enrichment import enrichment_note, enrichment_table
from charmlib.evaluation.groups import group_table
from charmlib.evaluation.published import beside_published
from charmlib.evaluation.runs import Predictions
from charmlib.evaluation.tables import (
    calibration_table,
    class_table,
    clusters,
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
from charmlib.viz.bank_content import plot_enrichment
from charmlib.viz.cooccurrence import plot_cooccurrence
from charmlib.viz.counts import plot_counts
from charmlib.viz.curves import plot_precision_recall, plot_roc, plot_roc_bands
from charmlib.viz.per_class import plot_per_class
from charmlib.viz.reliability import plot_reliability


def run_pictures(metrics: Mapping, predictions: Predictions, *, point: str = "youden") -> dict[str, object]:
    """Title -> figure: all pictures of a scored run, finished (with ``cell`` in its metrics) or not.

    There are no counts for a run without this operating point, and no enrichment without a bank.
    """
    part, note, name = metrics["test"], split_note(metrics), metrics.get("cell", "")
    how = {"title": name, "note": note}
    pictures = {"ROC curves": plot_roc(predictions, **how),
                "ROC curves with interval bands": plot_roc_bands(predictions, part, point=point, **how),
                "Precision and recall": plot_precision_recall(predictions, part, **how),
                "AUC by class": plot_per_class(metrics, **how)}
    if point in part["operating"]:
        pictures[f"Counts at the operating point '{point}'"] = plot_counts(
            part["operating"][point], title=name, note=f"{note}; {point_note(part, point)}")
    pictures["Calibration"] = plot_reliability(predictions, part["calibration"].get("scaled", {}).get("temperature"), **how)
    pictures["Co-occurrence of findings (test part)"] = plot_cooccurrence(predictions.labels, predictions.classes, note=note)
    if enriched := _enrichment(metrics):
        pictures["Enrichment of the memory bank"] = plot_enrichment(enriched, **how)
    return pictures


def _enrichment(metrics: Mapping) -> Mapping | None:
    return metrics["bank"] and metrics["bank"]["enrichment"]


def encoded_pictures(metrics: Mapping, predictions: Predictions, *, point: str = "youden") -> dict[str, bytes]:
    """Title -> PNG of :func:`run_pictures`, drawn once for the notebook and its report."""
    pictures = {}
    for title, figure in run_pictures(metrics, predictions, point=point).items():
        pictures[title] = page.png(figure)
        plt.close(figure)
    return pictures


def write_run_report(path: str | Path, metrics: Mapping, predictions: Predictions, pictures: Mapping) -> Path:
    """Write a run's ``report.html``: tables and pictures on one self-contained page; returns its path.

    ``pictures`` are those of :func:`run_pictures`, as figures or the bytes of PNGs.
    """
    part, name = metrics["test"], metrics.get("cell") or Path(path).resolve().parent.name
    published, remark = beside_published({**metrics, "cell": name})
    parts = [page.paragraph(f"{split_note(metrics)}. {origin_note(metrics)}.", "")]
    if "members" in metrics:
        parts.append(page.paragraph(f"Mean of the probabilities of {', '.join(metrics['members'])}."))
    parts += [page.heading("Scores on the whole test part"),
              page.paragraph(f"95 % intervals by bootstrap over {clusters(metrics['split'])}; 'undefined' is the share of "
                             "resamples that lack positives or negatives of a class, which are left out of its interval."),
              page.table(with_intervals(class_table(part, predictions.positives)), "first"),
              page.paragraph(f"{groups_note(part)}.")]
    if len(by_group := group_table(predictions)):
        parts += [page.heading("By view, sex and age group"), page.table(with_intervals(by_group), "words")]
    for point in part["operating"]:
        parts += [page.heading(f"Operating point '{point}'"),
                  page.paragraph(f"{point_note(part, point)}; thresholds stay fixed in the resamples. An interval of zero "
                                 "width at 0 or 1 means that all images are on one side of the threshold, not certainty."),
                  page.table(with_intervals(operating_table(part, point)))]
    if not part["operating"]:
        parts += [page.heading("Operating points"), page.paragraph(
            "None: the run was trained without a validation part (valid_fraction 0), so there was nothing to choose "
            "thresholds, a temperature or the best epoch on. It is never ranked beside runs that have one.")]
    parts += [page.heading("Calibration"), page.table(with_intervals(calibration_table(part), 4), "words"),
              page.heading("Comparison with published results"), page.paragraph(remark)]
    if published is not None:
        parts.append(page.table(with_intervals(published, 4), "words"))
    if enriched := _enrichment(metrics):
        parts += [page.heading("Rare findings in the memory bank"), page.paragraph(enrichment_note(enriched)),
                  page.table(with_intervals(enrichment_table(enriched), 2))]
    return page.write_page(path, f"Run {name}", parts + page.pictures(pictures), drawn=metrics["data"]["drawn"])


def write_evaluation(folder: str | Path, metrics: Mapping, predictions: Predictions, point: str) -> Path:
    """Write ``report.html`` and ``per_class.csv`` of a run into a folder; returns the page's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    calls = operating_table(metrics["test"], point)
    table = class_table(metrics["test"], predictions.positives).merge(calls, on="class", how="left",
                                                                      suffixes=("", " at the point"))
    table = with_origin(table, metrics).assign(run=metrics["cell"], point=point if len(calls) else pd.NA)
    write_whole(folder / "per_class.csv", lambda temporary: table.to_csv(temporary, index=False))
    return write_run_report(folder / "report.html", metrics, predictions, encoded_pictures(metrics, predictions, point=point))


def evaluation_text(metrics: Mapping, predictions: Predictions, point: str) -> str:
    """The tables of a run for a terminal: scores, counts at an operating point, calibration."""
    part = metrics["test"]
    calls = operating_table(part, point)
    lines = [f"{metrics['cell']}: {split_note(metrics)}; {origin_note(metrics)}"]
    if "members" in metrics:
        lines.append(f"mean of the probabilities of {', '.join(metrics['members'])}")
    lines.append(with_intervals(class_table(part, predictions.positives)).to_string(index=False))
    if part["undefined"]:
        lines.append(f"left out of the means, having no positives or no negatives: {', '.join(part['undefined'])}")
    if len(by_group := group_table(predictions)):
        lines.append(f"\nby group:\n{with_intervals(by_group).to_string(index=False)}\n")
    lines += [groups_note(part), f"\n{point_note(part, point)}" + (":" if len(calls) else "")]
    if len(calls):
        lines.append(with_intervals(calls).to_string(index=False))
    return "\n".join([*lines, "\ncalibration:", with_intervals(calibration_table(part), 4).to_string(index=False)])
