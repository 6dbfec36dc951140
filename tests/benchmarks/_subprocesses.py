"""Contestants that are fresh Python processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from tests.benchmarks._harness import ROOT


def python(code: str) -> Callable[[], None]:
    """A contestant that starts an interpreter and runs `code`, which must end without error."""

    def run() -> None:
        # In the checkout's folder, so that `-c` imports this zoo and not an installed one.
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)

    return run
