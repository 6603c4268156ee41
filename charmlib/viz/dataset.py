"""What a data set holds: findings by part, patients, views, findings that come together, sample images.

``data`` is a :class:`charmlib.data.dataset.ChestData`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from charmlib.data.show import show_images
from charmlib.evaluation.metrics import frequency_groups, prevalence
from charmlib.nih import PARTS
from charmlib.viz import page
from charmlib.viz.cooccurrence import plot_cooccurrence
from charmlib.viz.style import FIRST, GUIDE, OKABE_ITO, SECOND, heading, readable, styled

_COLOURS = dict(zip(PARTS, (FIRST, OKABE_ITO[4], SECOND)))
_SAID = dict(zip(PARTS, ("training", "validation", "test")))
_OLDEST = 120  # the NIH table has ages up to 414


def _parts(data) -> list[str]:
    """The parts that have images: validation may have none."""
    return [part for part in PARTS if data.split.counts[part]["images"]]


def part_table(data) -> pd.DataFrame:
    """A row a part: images, patients, images a patient, findings, age, sex and view."""
    rows = []
    for part in _parts(data):
        frame = data.index.frame.iloc[data.split.rows(part)]
        finding = data.index.has_finding()[data.split.rows(part)]
        rows.append({"part": part, "images": f"{len(frame):,}", "patients": f"{frame['patient'].nunique():,}",
                     "images a patient": f"{len(frame) / max(frame['patient'].nunique(), 1):.1f}",
                     "with a finding": f"{finding.mean():.1%}",
                     "age (quartiles)": _quartiles(frame["age"]),
                     "sex": _shares(frame["sex"]), "view": _shares(frame["view"])})
    return pd.DataFrame(rows)


def _quartiles(age: pd.Series) -> str:
    age = age[age <= _OLDEST]
    return " / ".join(f"{v:.0f}" for v in age.quantile([0.25, 0.5, 0.75])) if len(age) else "?"


def _shares(values: pd.Series) -> str:
    known = values[values != ""]
    return ", ".join(f"{name} {share:.0%}" for name, share in known.value_counts(normalize=True).items()) or "?"


def finding_table(data) -> pd.DataFrame:
    """A row a class, the most frequent first: positives of each part, prevalence in training, and its group by frequency."""
    shares = _prevalence(data)["train"]
    group = {name: kind for kind, names in frequency_groups(shares).items() for name in names}
    rows = [{"class": readable(name), **{part: f"{_positives(data, part)[name]:,}" for part in _parts(data)},
             "prevalence (train)": f"{shares[name]:.2%}", "group": group.get(name, "?")} for name in data.classes]
    return pd.DataFrame(rows).iloc[np.argsort([-shares[name] for name in data.classes])].reset_index(drop=True)


def _positives(data, part: str) -> dict[str, int]:
    counts = (data.labels[data.split.rows(part)] == 1).sum(0)
    return dict(zip(data.classes, counts.tolist()))


def _prevalence(data) -> dict[str, dict[str, float]]:
    return {part: prevalence(data.labels[data.split.rows(part)], data.classes) for part in _parts(data)}


def _note(data) -> str:
    counts = data.split.counts
    return (f"{data.source}, split '{data.split.name}' ({data.split.hash[:8]}): "
            + ", ".join(f"{counts[p]['images']:,} {p} images of {counts[p]['patients']:,} patients" for p in _parts(data))
            + ("" if data.split.has_valid else ", no validation part"))


@styled
def plot_prevalence(data):
    """Share of positives of each class in each part, most frequent first, on a logarithmic axis; returns the figure.

    A long tail is a straight line here. Dashed lines part head, medium and tail classes (5 % and 2 % of the training part).
    """
    shares, parts = _prevalence(data), _parts(data)
    order = sorted(data.classes, key=lambda name: np.nan_to_num(shares["train"][name]))
    at = np.arange(len(order))
    figure, axis = plt.subplots(figsize=(8.6, 0.34 * len(order) + 1.6), layout="constrained")
    for offset, part in zip((0.27, 0, -0.27) if len(parts) == 3 else (0.135, -0.135), parts):
        axis.barh(at + offset, [shares[part][name] for name in order], height=0.25, color=_COLOURS[part], label=part)
    counts = {part: _positives(data, part) for part in parts}
    top = max(np.nanmax(list(shares[part].values()), initial=0.01) for part in parts)
    for i, name in enumerate(order):
        axis.text(top * 1.25, i, " / ".join(f"{counts[part][name]:,}" for part in parts), va="center", fontsize=8)
    for border in (0.05, 0.02):
        axis.axvline(border, color=GUIDE, ls="--", lw=0.8)
        axis.text(border, len(order) - 0.35, f"{border:.0%}", color=GUIDE, fontsize=7.5, ha="center")
    axis.set_yticks(at, [readable(name) for name in order])
    axis.set(xscale="log", xlim=(None, top * 4.5), xlabel="share of images that are positive; at the right their number in "
             + " / ".join(_SAID[part] for part in parts))
    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axis.grid(axis="y", visible=False)
    axis.legend(loc="lower right", bbox_to_anchor=(0.72, 0.02))
    heading(figure, "", _note(data))
    return figure


@styled
def plot_patients(data):
    """Age by sex, images a patient, and views by part; returns the figure."""
    frame = data.index.frame.assign(part=data.split.part)
    frame = frame[frame["part"] != ""]
    figure, (ages, visits, views) = plt.subplots(1, 3, figsize=(10, 3.1), layout="constrained")
    people = frame.drop_duplicates("patient")
    known = people[people["age"] <= _OLDEST]
    for colour, (sex, group) in zip((FIRST, SECOND, OKABE_ITO[2]), known.groupby("sex")):
        ages.hist(group["age"], bins=np.arange(0, 101, 5), histtype="step", lw=1.6, color=colour, label=sex or "unknown")
    ages.set(xlabel="age at the first image", ylabel="patients")
    if len(known):
        ages.legend()
    count = frame["patient"].value_counts()
    bins = np.unique(np.geomspace(1, max(int(count.max()), 2) + 1, 24).astype(int))
    visits.hist(count, bins=bins, color=FIRST)
    visits.set(xscale="log", yscale="log", xlabel="images of one patient", ylabel="patients")
    parts = _parts(data)
    for i, part in enumerate(parts):
        left = 0.0
        for colour, (view, share) in zip(OKABE_ITO, frame.loc[frame["part"] == part, "view"].replace("", "unknown")
                                         .value_counts(normalize=True).sort_index().items()):
            views.barh(i, share, left=left, color=colour, label=view if i == 0 else None)
            views.text(left + share / 2, i, f"{view} {share:.0%}", ha="center", va="center", fontsize=8, color="white")
            left += share
    views.set_yticks(range(len(parts)), parts)
    views.set(xlim=(0, 1), xlabel="share of the part's images by view")
    views.invert_yaxis()
    views.grid(visible=False)
    heading(figure, "", _note(data))
    return figure


def plot_samples(data, *, seed: int = 0):
    """A training image of each class and one without a finding, drawn by ``seed``, titled by all their findings; returns
    the figure."""
    generator, rows = np.random.default_rng(seed), data.split.rows("train")
    labels, shown = data.labels[rows], []
    for c in range(len(data.classes)):
        found = np.setdiff1d(rows[labels[:, c] == 1], shown)
        shown += generator.choice(found, 1).tolist() if len(found) else []
    without = rows[~data.index.has_finding()[rows]]
    shown += generator.choice(without, 1).tolist() if len(without) else []
    names = [[readable(c) for c, v in zip(data.classes, data.labels[i]) if v == 1] or ["No Finding"] for i in shown]
    return show_images(data.images[np.array(shown, dtype=np.int64)], ["\n".join(n) for n in names],
                       note=data.source if data.index.drawn else "")


def dataset_pictures(data) -> dict[str, object]:
    """Title -> figure: all that is drawn of a data set."""
    return {"Findings by part": plot_prevalence(data), "Patients and views": plot_patients(data),
            "Findings that come together (training part)": plot_cooccurrence(
                data.labels[data.split.rows("train")], data.classes, note=_note(data)),
            "A training image of each finding": plot_samples(data)}


def write_dataset_page(path: str | Path, data, pictures=None) -> Path:
    """Tables and pictures of a data set on one page that needs nothing else; returns its path."""
    drawn_here = pictures is None
    pictures = dataset_pictures(data) if drawn_here else pictures
    groups = "Positives of each part. Groups by prevalence in training: head above 5 %, medium 2 to 5 %, tail below 2 %."
    parts = [page.paragraph(_note(data), ""), page.heading("Parts"), page.table(part_table(data), "words"),
             page.heading("Findings"), page.paragraph(groups), page.table(finding_table(data)),
             page.heading("What was odd"), page.paragraph(str(data.index.report))]
    for title, figure in pictures.items():
        parts += [page.heading(title), page.picture(figure, title)]
        if drawn_here:
            plt.close(figure)
    return page.write_page(path, f"Data: {data.source}", parts, drawn=data.index.drawn)
