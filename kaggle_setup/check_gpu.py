"""Names each GPU, its architecture, and whether this torch has kernels for it; else what to install or to choose.

On Kaggle as a first cell, nothing installed, the wheel's dataset attached:

    %run /kaggle/input/datasets/YOUR_NAME/charmlib-wheel/check_gpu.py
"""

import sys
from pathlib import Path


def use_charmlib() -> None:
    """Make charmlib importable from the checkout or wheel that this file lies in."""
    here = Path(__file__).resolve().parent
    wheels = sorted(here.glob("charmlib-*.whl"))  # pure Python: it is imported as the archive that it is
    sys.path.insert(0, str(wheels[-1] if wheels else here.parent))


if __name__ == "__main__":
    use_charmlib()
    from charmlib.gpu_support import gpu_report

    print(gpu_report())
