"""Tests that checkpoint folders of every format version since the first one stay loadable.

Below `tests/formats/<version>` lies a tiny checkpoint as that version wrote it, never to be
changed, and beside it what its network computed then. With a new version comes a new folder.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoo import checkpoints
from zoo.checkpoints import FORMAT_VERSION

FORMATS = Path(__file__).parent / "formats"

SHA256 = {
    1: "67b14b6719f03232a4410d66b7a5cd2e94f84f8694bbd5261dd2b87fa02e8d36",
}
"""Format version -> sha256 of `config.json` and `model.safetensors`, one after the other."""


def test_every_version_has_a_checkpoint() -> None:
    versions = list(range(1, FORMAT_VERSION + 1))
    assert sorted(int(path.name) for path in FORMATS.iterdir()) == versions == sorted(SHA256)


@pytest.mark.parametrize("version", SHA256)
def test_a_checkpoint_of_an_earlier_version_loads_and_computes_the_same(version: int) -> None:
    folder = FORMATS / str(version) / "checkpoint"
    content = (folder / "config.json").read_bytes() + (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256[version], "stored files never change"
    assert json.loads((folder / "config.json").read_bytes())["format_version"] == version
    module = checkpoints.load(folder)
    assert module.load_report.dropped == module.load_report.initialised == ()
    stored = load_file(FORMATS / str(version) / "output.safetensors")
    with torch.no_grad():
        logits, _ = module.network(stored["tokens"])
    torch.testing.assert_close(logits, stored["logits"], rtol=1e-4, atol=1e-4)
    assert stored["logits"].std() > 0.1
