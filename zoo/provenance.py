"""Where a number comes from: versions, machine and commit."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["machine", "made_by", "source_commit", "versions"]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {name: version(name) for name in ("torch", "lightning", "timm")}
    return {"python": platform.python_version(), **found}


def made_by(command: str) -> dict[str, Any]:
    """What a kept record says of itself: its command, today's date and `versions`."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }


def machine() -> str:
    """Processor, cores and accelerators, as far as the system tells; no name of the machine."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([f"{name}, {os.cpu_count()} cores", *cuda])


@functools.cache
def source_commit() -> str | None:
    """The commit of this project's checkout; None outside of one.

    Local changes are not seen: commit before a training whose numbers are to be published.
    """
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
