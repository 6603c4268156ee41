"""Mean AUC and log loss of finished runs' validation parts for each weight of the votes (docs/protocol.md, part 3).

    python -m benchmarks.vote_weights benchmarks/results/nih64_votes.csv RUN...

The head's logits and the votes' are computed once; a run's logits are ``lerp(head, prior + votes, weight)``.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from charmlib.evaluation.metrics import mean_auc
from charmlib.nih import finding_columns
from charmlib.nn.votes import WEIGHTS
from charmlib.training.run import Run


def rows_of(folder: str) -> list[dict]:
    """A row for each weight of one run."""
    run = Run.load(folder)
    chosen = round(run.net.bank.weight.item(), 7)
    ends = []
    for end in (0, 1):
        run.net.bank.weight.fill_(end)
        logits, labels = run.logits("valid")
        ends.append(logits.astype(np.float64))
    columns, normal = finding_columns(run.data.classes, run.data.index.normal_class), run.data.index.normal_class
    y = torch.from_numpy(labels[:, columns]).double()
    known, found = ~torch.isnan(y), []
    for weight in WEIGHTS:
        logits = (1 - weight) * ends[0] + weight * ends[1]
        loss = F.binary_cross_entropy_with_logits(torch.from_numpy(logits[:, columns])[known], y[known]).item()
        auc = mean_auc(labels, logits.astype(np.float32), run.data.classes, normal)
        found.append({"run": Path(folder).name, "seed": run.params["seed"], "vote_weight": weight, "chosen": weight == chosen,
                      "images": len(labels), "mean_auc": round(auc, 5), "log_loss": round(loss, 5)})
    return found


def main() -> None:
    path, *folders = sys.argv[1:]
    table = pd.DataFrame([row for folder in folders for row in rows_of(folder)])
    table.to_csv(path, index=False, lineterminator="\n")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
