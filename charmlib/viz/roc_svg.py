"""ROC curves as an inline SVG, in the colours of the page and drawn in a millisecond."""

from collections.abc import Mapping

from charmlib.viz.cards import text
from charmlib.viz.walk import Walk


def roc_svg(walks: Mapping[str, Walk], title: str, here: Mapping[str, float]) -> str:
    """The curve of each walk under its name, the second dashed; on the first the point ``here`` (specificity, sensitivity)."""
    left, top, side = 46, 24, 330
    middle, base = "text-anchor='middle'", top + side
    ticks = "".join(f"<text x='{left - 6}' y='{base - side * v + 4:.0f}' text-anchor='end'>{v:g}</text>"
                    f"<text x='{left + side * v:.0f}' y='{base + 16}' {middle}>{v:g}</text>" for v in (0, 0.25, 0.5, 0.75, 1))

    def at(false: float, true: float) -> str:
        return f"{left + side * false:.1f},{base - side * true:.1f}"

    lines = ""
    for i, (name, walk) in enumerate(walks.items()):
        points = " ".join(at(walk.fp[p] / max(walk.fp[-1], 1), walk.tp[p] / max(walk.tp[-1], 1)) for p in walk.stations(400))
        look = "fill='none' stroke-width='2' stroke=" + ("'var(--other)' stroke-dasharray='5 4'" if i else "'var(--line)'")
        y = base - 12 - 18 * (len(walks) - 1 - i)
        lines += (f"<polyline points='{points}' {look}/><path d='M{left + 96},{y - 4}h24' {look}/>"
                  f"<text x='{left + 126}' y='{y}'>{text(name[-32:])}</text>")
    x, y = at(1 - here["specificity"], here["sensitivity"]).split(",")
    point = "" if "nan" in (x, y) else f"<circle cx='{x}' cy='{y}' r='6' fill='var(--here)' stroke='#fff'/>"
    words = text(f"ROC curve, {title}: {'; '.join(walks)}. At the chosen point sensitivity {here['sensitivity']:.3f}, "
                 f"specificity {here['specificity']:.3f}")
    return (f"<svg class='roc' role='img' aria-label='{words}' viewBox='0 0 {left + side + 14} {base + 40}'>"
            f"<text x='{left}' y='14' font-weight='600'>{text(title)}</text>{ticks}"
            f"<path d='M{left},{top}v{side}h{side}m-{side},0l{side},-{side}' fill='none' stroke='var(--edge)'/>{lines}{point}"
            f"<text x='{left + side / 2:.0f}' y='{base + 34}' {middle}>false positive rate (1 - specificity)</text>"
            f"<text transform='translate(12,{top + side / 2:.0f}) rotate(-90)' {middle}>sensitivity</text></svg>")
