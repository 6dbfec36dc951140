"""Files that would create a file if anything unpickled them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


def payload_bare(path: Path, witness: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(witness), protocol=2))


def payload_zip(path: Path, witness: Path) -> None:
    torch.save({"state_dict": {"w": torch.zeros(2)}, "extra": Payload(witness)}, path)


def payload_legacy(path: Path, witness: Path) -> None:
    torch.save(Payload(witness), path, _use_new_zipfile_serialization=False)


def payload_in_tensor_storage(path: Path, witness: Path) -> None:
    """A sound file, one tensor of which holds a pickle's bytes; nothing may look at them so."""
    content = pickle.dumps(Payload(witness))
    save_file({"w": torch.frombuffer(bytearray(content), dtype=torch.uint8)}, path)


PAYLOADS = [payload_bare, payload_zip, payload_legacy]
