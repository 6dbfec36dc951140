"""What `zoo.load` of the bundled weight costs in a fresh process.

The peers: `import torch`, without which nothing can be loaded; `import lightning.pytorch`, without
which there is no LightningModule; and `timm.create_model` of a net of equal size from a local file.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.benchmarks._harness import Comparison, race
from tests.benchmarks._subprocesses import python

ROUNDS = 4
MODEL = "cached-transformer-lm"
PEER = "vit_tiny_patch16_224"
"""Of 5.7 million parameters, as the bundled weight."""


def run(rounds: int) -> list[Comparison]:
    """Fresh processes, the files of all of them in the file system's cache."""
    ours, torch, lightning = f"`zoo.load({MODEL!r})`", "`import torch`", "`import lightning`"
    timm = f"`timm.create_model({PEER!r})`"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        python(
            f"import timm, safetensors.torch as s; "
            f"s.save_file(timm.create_model({PEER!r}).state_dict(), {str(path)!r})"
        )()
        overlay = json.dumps({"file": str(path)})
        taken = race(
            {
                ours: python(f"import zoo; zoo.load({MODEL!r})"),
                torch: python("import torch"),
                lightning: python("import lightning.pytorch"),
                timm: python(
                    f"import timm; timm.create_model({PEER!r}, pretrained=True, "
                    f"pretrained_cfg_overlay={overlay})"
                ),
            },
            rounds,
        )
    limits = {torch: 2.0, lightning: 1.1, timm: 1.0}
    return [
        Comparison(
            name="fresh process",
            contestant=ours,
            peer=peer,
            values=taken[ours],
            peer_values=taken[peer],
            at_most=limit,
        )
        for peer, limit in limits.items()
    ]
