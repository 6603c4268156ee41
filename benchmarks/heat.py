"""What heat maps cost beside scoring: 512 images of 224 pixels, one finding, at each stride that the network has.

    python -m benchmarks.heat       # 3 minutes on two idle cores

Scoring and maps of a batch take turns. Ratios are medians over batches. Images are noise: the time does not depend on them.
"""

import argparse
import statistics
from functools import partial

import torch

from benchmarks.measure import interleaved, median_ratio, save
from charmlib.models import CharmNet
from charmlib.nn.heat import grad_cam, strides_of
from charmlib.training.device import pick_device, pick_precision, place

ARCHS, IMAGES, BATCH, SIZE = ("mobilenet_v2", "densenet121"), 512, 16, 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    device, rows = pick_device(parser.parse_args().device), []
    for arch in ARCHS:
        net = place(CharmNet(arch, weights="none", norm="half", use_bank=False).eval(), device)
        batches = iter(torch.randn(1 + IMAGES // BATCH, BATCH, 3, SIZE, SIZE))
        x = torch.empty(BATCH, 3, SIZE, SIZE, device=device).to(memory_format=torch.channels_last)

        def score(x=x, net=net, batches=batches):
            x.copy_(next(batches))
            with torch.no_grad():
                net(x).cpu()

        cases = {"score": score} | {stride: partial(lambda stride, x, net: grad_cam(net, x, [0], stride).cpu(), stride, x, net)
                                    for stride in strides_of(net) if stride >= 4}
        seconds = interleaved(cases, IMAGES // BATCH)
        rows += [{"arch": arch, "stride": stride, "seconds": round(sum(seconds[stride]), 2),
                  "seconds_of_scoring": round(sum(seconds["score"]), 2), "milliseconds_a_batch": round(
                      1e3 * statistics.median(seconds[stride]), 1), "times_scoring": round(
                      median_ratio(seconds[stride], seconds["score"]), 3)} for stride in cases if stride != "score"]
    print(*rows, sep="\n")
    save("heat", device, pick_precision("auto", device), {"images": IMAGES, "image_size": SIZE, "batch": BATCH, "findings": 1,
                                                         "asked": 1.5, "rows": rows})


if __name__ == "__main__":
    main()
