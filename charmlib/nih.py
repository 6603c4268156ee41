"""The NIH ChestX-ray14 vocabulary: findings, files and parts, in the order of Wang et al. (CVPR 2017, arXiv 1705.02315)."""

NIH14 = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
         "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia")
NO_FINDING = "No Finding"
NIH15 = (*NIH14, NO_FINDING)

PARTS = ("train", "valid", "test")

TABLES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv", "sample_labels.csv")
TRAIN_LISTS = ("train_val_list.txt", "train_val_list_NIH.txt")
TEST_LISTS = ("test_list.txt", "test_list_NIH.txt")
PHANTOM_MARK = "PHANTOM.json"
KAGGLE_DATASETS = (("nih-chest-xrays", "data"), ("khanfashee", "nih-chest-x-ray-14-224x224-resized"),
                   ("nih-chest-xrays", "sample"))

_BY_KEY = {name.replace(" ", "_").lower(): name for name in NIH15}


def canonical(label: str) -> str:
    """A finding as the NIH tables write it: ``'pleural thickening'`` becomes ``'Pleural_Thickening'``."""
    return _BY_KEY.get(label.strip().replace(" ", "_").lower(), label.strip())


def same_order(ours, theirs, what: str) -> None:
    """Compare two lists of classes name by name.

    Raises
    ------
    ValueError
        The lists differ; names the first difference.
    """
    ours, theirs = list(ours), list(theirs)
    if ours == theirs:
        return
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            raise ValueError(f"{what}: class {i} is {a!r} here and {b!r} there; scores would be paired wrongly")
    raise ValueError(f"{what}: {len(ours)} classes here, {len(theirs)} there")
