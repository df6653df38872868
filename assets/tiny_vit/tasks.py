"""The views as tasks for ``app.py evaluate`` and ``compare``. ``python -m assets.tiny_vit.tasks [--out FOLDER]``

One ``<view>.yaml`` with a ``<view>.npz`` for each view, of the test images; ``<view>.validation`` for choosing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from assets.tiny_vit.build import VIEWS
from assets.tiny_vit.table import read_split

HERE = Path(__file__).parent
DARKEST = 16
TASK = "kind: image\narrays: {name}.npz\nlayout: NHW\nrescale_factor: 0.125\nimage_mean: 1\n"


def stored(view: str, images: torch.Tensor) -> np.ndarray:
    """Images (n, 8, 8), 0 to 16, in this view. The views are defined for what the model sees, -1 to 1."""
    seen = VIEWS[view](images[:, None].float() - DARKEST / 2)
    return (seen + DARKEST / 2)[:, 0].to(torch.uint8).numpy()


def write_tasks(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for split, ending in (("test", ""), ("validation", ".validation")):
        images, labels = read_split(split)
        for view in VIEWS:
            name = f"{view}{ending}"
            np.savez_compressed(out / f"{name}.npz", images=stored(view, images), labels=labels.numpy())
            (out / f"{name}.yaml").write_text(TASK.format(name=name))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "tasks", help="default: assets/tiny_vit/tasks")
    write_tasks(parser.parse_args().out)


if __name__ == "__main__":
    main()
