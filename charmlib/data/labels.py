"""The label vocabulary, in the order of the NIH paper (Wang et al., CVPR 2017, arXiv 1705.02315)."""

from __future__ import annotations

NIH14 = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
         "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia")
NO_FINDING = "No Finding"
NIH15 = (*NIH14, NO_FINDING)


def canonical(label: str) -> str:
    """A finding as the NIH tables write it: ``'pleural thickening'`` becomes ``'Pleural_Thickening'``."""
    key = label.strip().replace(" ", "_").lower()
    return _BY_KEY.get(key, label.strip())


_BY_KEY = {name.replace(" ", "_").lower(): name for name in NIH15}


def same_order(ours, theirs, what: str) -> None:
    """Refuse two label lists that differ, naming the first difference.

    Raises
    ------
    ValueError
        The lists are not equal, name by name.
    """
    ours, theirs = list(ours), list(theirs)
    if ours == theirs:
        return
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            raise ValueError(f"{what}: class {i} is {a!r} here and {b!r} there; scores would be paired wrongly")
    raise ValueError(f"{what}: {len(ours)} classes here, {len(theirs)} there")
