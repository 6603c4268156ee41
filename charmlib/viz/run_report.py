"""A run's pictures, and its ``report.html``."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from charmlib.evaluation import few, tables
from charmlib.evaluation.enrichment import enrichment_note, enrichment_table
from charmlib.evaluation.published import beside_published
from charmlib.evaluation.runs import Predictions
from charmlib.evaluation.tables import with_intervals
from charmlib.files import write_csv
from charmlib.viz import page
from charmlib.viz.bank_content import plot_enrichment
from charmlib.viz.cooccurrence import plot_cooccurrence
from charmlib.viz.curves import plot_precision_recall, plot_reliability, plot_roc, plot_roc_bands
from charmlib.viz.per_class import plot_counts, plot_per_class

PANELS = 40  # classes that fit on a picture


def run_pictures(metrics: Mapping, predictions: Predictions, *, point: str = "youden") -> dict[str, object]:
    """Title -> figure: all pictures of a scored run, finished (with ``cell`` in its metrics) or not.

    There are no counts for a run without this operating point, and no enrichment without a bank. Of more than 40 classes,
    the rarest 40 with positives are drawn.
    """
    part, note, name = metrics["test"], tables.split_note(metrics), metrics.get("cell", "")
    if len(predictions.classes) > PANELS:
        shown = sorted(predictions.classes, key=lambda c: (predictions.positives[c] == 0, predictions.positives[c]))[:PANELS]
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


def write_run_report(path: str | Path, metrics: Mapping, predictions: Predictions, pictures: Mapping) -> Path:
    """Write a run's ``report.html``: tables and pictures on one self-contained page; returns its path.

    ``pictures`` are those of :func:`run_pictures`, as figures or the bytes of PNGs.
    """
    part, name = metrics["test"], metrics.get("cell") or Path(path).resolve().parent.name
    published, remark = beside_published({**metrics, "cell": name})
    parts = [page.paragraph(f"{tables.split_note(metrics)}. {tables.origin_note(metrics)}.", ""),
             *(page.paragraph(f"{text[0].upper()}{text[1:]}.") for text in _members(metrics)),
             page.heading("Scores on the whole test part"),
             page.paragraph(f"95 % intervals by bootstrap over {tables.clusters(metrics['split'])}; 'undefined' is the share "
                            "of resamples that lack positives or negatives of a class, which are left out of its interval."),
             page.table(with_intervals(tables.class_table(part, predictions.positives)), "first"),
             page.paragraph(". ".join(filter(None, (tables.groups_note(part), few.note(part["intervals"]["patients"]), ""))))]
    if len(by_group := predictions.by_group):
        parts += [page.heading("By view, sex and age group"), page.table(with_intervals(by_group), "words")]
    for point in part["operating"]:
        parts += [page.heading(f"Operating point '{point}'"),
                  page.paragraph(f"{tables.point_note(part, point)}; thresholds stay fixed in the resamples. An interval of "
                                 "zero width at 0 or 1 means that all images are on one side of the threshold, not certainty."),
                  page.table(with_intervals(tables.operating_table(part, point)), "notes")]
    if not part["operating"]:
        parts += [page.heading("Operating points"), page.paragraph(
            "None: the run was trained without a validation part (valid_fraction 0), so there was nothing to choose "
            "thresholds, a temperature or the best epoch on. It is never ranked beside runs that have one.")]
    parts += [page.heading("Calibration"), page.table(with_intervals(tables.calibration_table(part), 4), "words"),
              page.heading("Comparison with published results"), page.paragraph(remark),
              *([] if published is None else [page.table(with_intervals(published, 4), "words")])]
    if enriched := metrics["bank"] and metrics["bank"]["enrichment"]:
        parts += [page.heading("Rare findings in the memory bank"), page.paragraph(enrichment_note(enriched)),
                  page.table(with_intervals(enrichment_table(enriched), 2))]
    return page.write_page(path, f"Run {name}", parts + page.pictures(pictures), drawn=metrics["data"]["drawn"])


def write_evaluation(folder: str | Path, metrics: Mapping, predictions: Predictions, point: str) -> Path:
    """Write ``report.html`` and ``per_class.csv`` of a run into a folder; returns the page's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    calls = tables.operating_table(metrics["test"], point)
    table = tables.class_table(metrics["test"], predictions.positives).merge(calls, on="class", how="left",
                                                                             suffixes=("", " at the point"))
    write_csv(folder / "per_class.csv", tables.with_origin(table, metrics).assign(
        run=metrics["cell"], point=point if len(calls) else pd.NA))
    return write_run_report(folder / "report.html", metrics, predictions, encoded_pictures(metrics, predictions, point=point))


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
