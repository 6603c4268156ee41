import pytest
import torch

from charmlib.nn import RareMemoryBank


def test_the_table_shows_filled_slots_and_the_counts_agree():
    bank = RareMemoryBank(4, 3, size=6, k=1, threshold=0.0)
    assert bank.table().empty and bank.label_counts().tolist() == [0, 0, 0, 0]
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [0, float("nan"), 0], [float("nan")] * 3])
    bank.train()
    bank.expect(torch.tensor([7, 5, 3, -1]), labels)
    bank(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    table = bank.table(classes=["A", "B", "No Finding"])
    assert list(table) == ["slot", "image", "labels", "step", "score", "A", "B", "No Finding"]
    assert table["image"].tolist()[:3] == [7, 5, 3] and table["image"].isna().tolist() == [False] * 3 + [True]
    assert table["labels"].tolist() == ["A|No Finding", "No Finding", "No Finding", ""]
    assert table["B"].isna().tolist() == [False, False, True, True] and table["step"].tolist() == [0] * 4
    assert bank.label_counts().tolist() == [1, 0, 1, 2]
    assert bank.label_counts([1]).tolist() == [1, 0, 1, 2]  # of the other image no finding's label is known
    assert bank.table(names=[f"{i}.png" for i in range(8)])["image"].tolist()[:3] == ["7.png", "5.png", "3.png"]
    with pytest.raises(ValueError, match="3 labels, 2 class names"):
        bank.table(classes=["A", "B"])
