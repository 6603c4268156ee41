"""One style for all pictures: readable at notebook width and in print, safe for colour-blind readers."""

OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222")
"""The palette of Okabe and Ito."""

LINES = ("-", "--")
"""Seven colours and two line kinds tell fourteen classes apart."""


def class_style(i: int) -> dict:
    """Colour and line kind of class ``i``."""
    return {"color": OKABE_ITO[i % len(OKABE_ITO)], "ls": LINES[i // len(OKABE_ITO) % len(LINES)]}
