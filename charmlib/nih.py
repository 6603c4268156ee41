"""The NIH ChestX-ray14 vocabulary: findings, files and parts, in the order of Wang et al. (CVPR 2017, arXiv 1705.02315)."""

from collections.abc import Iterable

NIH14 = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
         "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia")
NO_FINDING = "No Finding"
NIH15 = (*NIH14, NO_FINDING)

EACH_ITS_OWN = "each image is its own"  # what a patient is where a data set names none (charmlib.data.splits.Split)
PARTS = ("train", "valid", "test")
TABLES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv", "sample_labels.csv")
TRAIN_LISTS = ("train_val_list.txt", "train_val_list_NIH.txt")
TEST_LISTS = ("test_list.txt", "test_list_NIH.txt")
PHANTOM_MARK = "PHANTOM.json"
KAGGLE_DATASETS = (("nih-chest-xrays", "data"), ("khanfashee", "nih-chest-x-ray-14-224x224-resized"),
                   ("nih-chest-xrays", "sample"))

_NORMAL = ("no finding", "no findings", "nofinding", "nofindings", "normal", "healthy", "no abnormality", "no abnormalities",
           "without findings", "unremarkable")
_BY_KEY = {name.replace(" ", "_").lower(): name for name in NIH15}


def canonical(label: str) -> str:
    """A finding as the NIH tables write it: ``'pleural thickening'`` becomes ``'Pleural_Thickening'``."""
    return _BY_KEY.get(label.strip().replace(" ", "_").lower(), label.strip())


def is_normal(label: str) -> bool:
    """Whether a label says that there is no finding: ``'No Finding'``, ``'no_findings'``, ``'NORMAL'`` and the like."""
    return " ".join(label.lower().replace("_", " ").replace("-", " ").split()) in _NORMAL


def normal_class(classes: Iterable[str], named: str = "") -> str:
    """The class that means "no finding", '' where the classes have none; ``named`` is the parameter ``normal_class``.

    Raises ValueError if ``named`` is none of the classes, or several classes mean "no finding" and none is named.
    """
    classes = list(classes)
    if named in classes:
        return named
    if named and not is_normal(named):
        raise ValueError(f"normal_class: {named!r} is none of the classes {', '.join(classes)}")
    found = [name for name in classes if is_normal(name)]
    if len(found) > 1:
        raise ValueError(f"classes {', '.join(map(repr, found))} all mean 'no finding': rename or leave out all but one, or "
                         "name it with the parameter normal_class")
    return next(iter(found), "")


def finding_columns(classes: Iterable[str], named: str = "") -> list[int]:
    """Positions of the classes other than :func:`normal_class`: those that means over classes are over."""
    classes = list(classes)
    normal = normal_class(classes, named)
    return [i for i, name in enumerate(classes) if name != normal]


def people(count: int, patients_from: str) -> str:
    """The number of patients in words; says so where each image counts as a patient of its own."""
    return f"{count:,} patients" + (" (unknown: each image counts as one)" if patients_from == EACH_ITS_OWN else "")


def same_order(ours, theirs, what: str) -> None:
    """Raises ValueError if two lists of classes differ; names the first difference."""
    ours, theirs = list(ours), list(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            raise ValueError(f"{what}: class {i} is {a!r} here and {b!r} there; scores would be paired wrongly")
    if len(ours) != len(theirs):
        raise ValueError(f"{what}: {len(ours)} classes here, {len(theirs)} there")
