"""What is odd about a data set, in words."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Report:
    """Irregularities of the data: kind -> names. Whatever is left out of a data set is named here."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, names: Iterable) -> None:
        """Note names under a kind; without names nothing is noted."""
        if names := [str(n) for n in names]:
            self.found.setdefault(kind, []).extend(names)

    def __str__(self) -> str:
        return "\n".join(
            f"{kind}: {len(names)} ({', '.join(names[:5])}" + (f" ... and {len(names) - 5} more)" if len(names) > 5 else ")")
            for kind, names in self.found.items()) or "nothing odd found"
