"""What a run's network says of one picture, for pages that start without torch: it is imported at the first question."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd


def heat(run: str | Path, path: str | Path, finding: str, stride: int = 32) -> Mapping:
    """See :func:`charmlib.training.heat.explain_picture`, on the CPU."""
    from charmlib.training.heat import explain_picture

    return explain_picture(run, path, finding=finding, stride=stride, device="cpu")


def opinion(run: str | Path, path: str | Path, finding: str, point: str, stride: int = 32) -> Mapping:
    """Of :func:`charmlib.training.predict.predict`: ``probabilities`` and ``calls`` (class -> number, and 0, 1 or missing), and
    what :func:`heat` gives beside them, or ``note``, which says why there is no map (of an ensemble, or at this stride).

    Raises :class:`charmlib.data.radiograph.NotARadiograph` for a file that is refused.
    """
    from charmlib.data.radiograph import NotARadiograph
    from charmlib.training.predict import predict

    row = predict(run, [path], point=point, device="cpu", refused=lambda line: None).iloc[0]
    if row["refused"]:
        raise NotARadiograph(f"{Path(path).name}: {row['refused']}")
    try:
        told = heat(run, path, finding, stride)
    except ValueError as error:
        told = {"note": str(error)}
    p, calls = ({name.removeprefix(kind): value for name, value in row.items() if name.startswith(kind) and pd.notna(value)}
                for kind in ("p_", "call_"))
    return {**told, "probabilities": p, "calls": calls}
