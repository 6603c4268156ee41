"""A data set on one page: findings by part, patients, views, co-occurrence, sample images.

``data`` is a :class:`charmlib.data.dataset.ChestData`.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from charmlib.data.show import show_images
from charmlib.evaluation.metrics import frequency_groups, prevalence
from charmlib.nih import NO_FINDING, PARTS, people
from charmlib.viz import page
from charmlib.viz.cooccurrence import plot_cooccurrence
from charmlib.viz.style import FIRST, GUIDE, OKABE_ITO, SECOND, heading, ink_on, readable, styled

_COLOURS = dict(zip(PARTS, (FIRST, OKABE_ITO[4], SECOND)))
_NAMES = dict(zip(PARTS, ("training", "validation", "test")))
_OLDEST = 120  # the NIH table has ages up to 414


def _rows(data) -> dict[str, np.ndarray]:
    """Row numbers of the parts that have images, which validation may lack."""
    return {part: data.rows(part) for part in PARTS if data.split.counts[part]["images"]}


def part_table(data) -> pd.DataFrame:
    """One row per part: images, patients, images a patient, findings, age, sex and view."""
    table = []
    for part, rows in _rows(data).items():
        frame = data.index.frame.iloc[rows]
        age = frame["age"][frame["age"] <= _OLDEST]
        patients = frame["patient"].nunique()
        table.append({"part": part, "images": f"{len(frame):,}", "patients": f"{patients:,}",
                      "images a patient": f"{len(frame) / patients:.1f}",
                      "with a finding": f"{data.index.has_finding()[rows].mean():.1%}",
                      "age (quartiles)": " / ".join(f"{v:.0f}" for v in age.quantile([0.25, 0.5, 0.75])) if len(age) else "?",
                      "sex": _shares(frame["sex"]), "view": _shares(frame["view"])})
    return pd.DataFrame(table)


def _shares(values: pd.Series) -> str:
    shares = values[values != ""].value_counts(normalize=True)
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) or "?"


def finding_table(data) -> pd.DataFrame:
    """One row per class, the rarest first: positives of each part, prevalence in training, and frequency group."""
    positives, shares = _by_class(data)
    groups = frequency_groups(shares["train"][list(data.index.findings)].to_dict())
    group = {name: kind for kind, names in groups.items() for name in names}
    table = positives.apply(lambda column: column.map("{:,}".format))
    table.insert(0, "class", [name.replace("_", " ") for name in data.classes])
    table["prevalence (train)"] = shares["train"].map("{:.2%}".format)
    table["group"] = [group.get(name, "?") for name in data.classes]
    return table.iloc[_order(data)].reset_index(drop=True)


def _order(data) -> np.ndarray:
    """Positions of the classes on the whole page: the rarest in training first, those without known labels last."""
    return np.argsort(_by_class(data)[1]["train"].to_numpy(), kind="stable")


def _by_class(data) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Number and share of positives, (classes x parts) each."""
    labels = {part: data.labels[rows] for part, rows in _rows(data).items()}
    return (pd.DataFrame({part: (values == 1).sum(0) for part, values in labels.items()}, index=list(data.classes)),
            pd.DataFrame({part: prevalence(values, data.classes) for part, values in labels.items()}))


def _note(data) -> str:
    counts = data.split.counts
    return (f"{data.source}, split '{data.split.name}' ({data.split.hash[:8]}): "
            + ", ".join(f"{counts[p]['images']:,} {p} images of {people(counts[p]['patients'], data.split.patients_from)}"
                        for p in _rows(data))
            + ("" if data.split.has_valid else ", no validation part"))


@styled
def plot_prevalence(data):
    """Share of positives of each class in each part, the rarest first, on a logarithmic axis; returns the figure.

    A long tail is a straight line here. Dashed lines separate head, medium and tail classes (5 % and 2 % of the training part).
    """
    positives, shares = _by_class(data)
    shares = shares.iloc[_order(data)[::-1]]
    positives = positives.loc[shares.index]
    at = np.arange(len(shares))
    figure, axis = plt.subplots(figsize=(8.6, 0.34 * len(at) + 1.6), layout="constrained")
    for offset, part in zip((0.27, 0, -0.27) if len(shares.columns) == 3 else (0.135, -0.135), shares):
        axis.barh(at + offset, shares[part], height=0.25, color=_COLOURS[part], label=part)
    top = np.nanmax(shares.to_numpy(), initial=0.01)
    for i, counts in enumerate(positives.to_numpy()):
        axis.text(top * 1.25, i, " / ".join(f"{count:,}" for count in counts), va="center", fontsize=8)
    for border in (0.05, 0.02):
        axis.axvline(border, color=GUIDE, ls="--", lw=0.8)
        axis.text(border, len(at) - 0.35, f"{border:.0%}", color="#666666", fontsize=7.5, ha="center")
    axis.set(yticks=at, yticklabels=[readable(name) for name in shares.index], xscale="log", xlim=(None, top * 4.5),
             xlabel=f"share of images that are positive; on the right their number in {' / '.join(map(_NAMES.get, shares))}")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %" if value <= 1 else "")
    axis.minorticks_off()
    axis.grid(axis="y", visible=False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return heading(figure, "", _note(data))


@styled
def plot_patients(data):
    """Age by sex, images a patient, and views by part; returns the figure."""
    parts = {part: data.index.frame.iloc[rows] for part, rows in _rows(data).items()}
    frame = data.index.frame[data.split.part != ""]
    figure, (ages, visits, views) = plt.subplots(1, 3, figsize=(10, 3.1), layout="constrained")
    people = frame.drop_duplicates("patient")
    known = people[people["age"] <= _OLDEST]
    for colour, (sex, group) in zip((FIRST, SECOND, OKABE_ITO[2]), known.groupby("sex")):
        ages.hist(group["age"], bins=np.arange(0, 101, 5), histtype="step", lw=1.6, color=colour,
                  label=readable(sex) or "unknown")
    ages.set(xlabel="age at the first image", ylabel="patients")
    if len(known):
        ages.legend()
    count = frame["patient"].value_counts()
    visits.hist(count, bins=np.unique(np.geomspace(1, max(int(count.max()), 2) + 1, 24).astype(int)), color=FIRST)
    visits.set(xscale="log", yscale="log", xlabel="images of one patient", ylabel="patients")
    for axis in (visits.xaxis, visits.yaxis):  # matplotlib's own are mathematics
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    for i, images in enumerate(parts.values()):
        left = 0.0
        shares = images["view"].replace("", "unknown").value_counts(normalize=True).sort_index()
        for colour, (view, share) in zip(OKABE_ITO, shares.items()):
            views.barh(i, share, left=left, color=colour)
            views.text(left + share / 2, i, f"{readable(view)} {share:.0%}", ha="center", va="center", fontsize=8,
                       color=ink_on(colour))
            left += share
    views.set(yticks=range(len(parts)), yticklabels=parts, xlim=(0, 1), xlabel="share of the part's images by view")
    views.invert_yaxis()
    views.grid(visible=False)
    return heading(figure, "", _note(data))


def plot_samples(data, *, seed: int = 0):
    """A training image of each class and one without a finding, drawn by ``seed`` and titled by its findings; returns the
    figure."""
    generator, rows = np.random.default_rng(seed), data.rows("train")
    shown: list[int] = []
    for c in _order(data):
        found = np.setdiff1d(rows[data.labels[rows, c] == 1], shown)
        shown += generator.choice(found, 1).tolist() if len(found) else []
    without = rows[~data.index.has_finding()[rows]]
    shown += generator.choice(without, 1).tolist() if len(without) else []
    names = [[readable(c) for c, v in zip(data.classes, data.labels[i]) if v == 1] or [NO_FINDING] for i in shown]
    return show_images(data.images[np.array(shown, dtype=np.int64)], ["\n".join(n) for n in names],
                       note=data.source if data.index.drawn else "")


def dataset_pictures(data) -> dict[str, object]:
    """Title -> figure: all pictures of a data set."""
    return {"Findings by part": plot_prevalence(data), "Patients and views": plot_patients(data),
            "Co-occurrence of findings (training part)": plot_cooccurrence(
                data.labels[data.rows("train")][:, (order := _order(data))], [data.classes[c] for c in order],
                note=data.note("train")),
            "A training image of each finding": plot_samples(data)}


def write_dataset_page(path: str | Path, data, pictures=None) -> Path:
    """Tables and pictures of a data set on one self-contained page; returns its path. ``pictures`` are drawn if not given."""
    drawn = dataset_pictures(data) if pictures is None else pictures
    groups = "Positives of each part. Groups by prevalence in training: head above 5 %, medium 2 to 5 %, tail below 2 %."
    path = page.write_page(path, f"Data: {data.source}", [
        page.paragraph(_note(data), "lead"), page.paragraph(f"Irregularities: {data.index.report}"), page.paragraph(page.ORDER),
        *page.pictures(drawn), page.heading("Parts"), page.table(part_table(data), "words"), page.heading("Findings"),
        page.paragraph(groups), page.table(finding_table(data))], drawn=data.index.drawn)
    for figure in drawn.values() if pictures is None else ():
        plt.close(figure)
    return path
