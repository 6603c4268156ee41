"""``card.md``: what a finished run is, how well it scores, what it cannot do, and how to make it again."""

from collections.abc import Mapping

import yaml

from charmlib.evaluation.tables import class_table, origin_note, point_note, split_note, with_intervals


def card_text(metrics: Mapping) -> str:
    """The model card of a run, in Markdown, from its ``metrics.json``."""
    from charmlib.params import DEFAULTS

    params, part = metrics["params"], metrics["test"]
    table = with_intervals(class_table(part), 3)
    rows = [list(table), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    figures = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    changed = yaml.safe_dump({name: value for name, value in params.items() if value != DEFAULTS.get(name)}, sort_keys=False)
    drawn = "\nIt was trained on drawn phantoms: its figures say nothing of radiographs." if metrics["data"]["drawn"] else ""
    members = "Members: " + ", ".join(metrics["members"]) + f", merged by {metrics.get('merge', 'mean')}.\n" \
        if "members" in metrics else ""
    return f"""# {metrics['cell']}

Research use only. It is no medical device, and no decision on a patient may rest on it.{drawn}

## What it is

{members}Network {params['system']}, {params['arch']}, {params['image_size']} pixels; classes: {', '.join(metrics['classes'])}.
{origin_note(metrics)}

## Data and figures

{split_note(metrics)}. Training images: {metrics['images']['all']:,}. Split hash: {metrics['split']['hash']}. Intervals: 95 %.

{figures}

## Limits

- {point_note(part, 'youden')}
- Labels of public data sets are in part wrong; figures on other hospitals' images are usually lower.
- Classes without figures in the test part: {', '.join(part['undefined']) or 'none'}.

## How to make it again

Hash of the run: {metrics.get('hash') or 'none, it was made outside a grid'}. `python -m charmlib run FILE` with this file:

```yaml
{changed.strip()}
```
"""
