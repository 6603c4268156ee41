"""What can go wrong between here and Kaggle."""


class KaggleError(RuntimeError):
    """A push, status or fetch that cannot go on; the message names the file, value or kernel and the remedy."""


class Refused(KaggleError):
    """Kaggle did not do what was asked; nothing counts as pushed."""


class SessionLimit(Refused):
    """Kaggle runs as many GPU sessions of this account as it allows; the same push works when one has ended."""


class NotThere(KaggleError):
    """Kaggle knows no kernel or dataset of this name, or does not show it to this account."""


class StartedWithout(Refused):
    """Kaggle started a kernel without one of the inputs that it names; that session is of no use."""


class Unclear(KaggleError):
    """The client failed in a way that does not tell what Kaggle did; asking for the status does."""
