"""What `import zoo`, `zoo --help` and `zoo list` cost over starting Python at all."""

from __future__ import annotations

from tests.benchmarks._harness import Comparison, race
from tests.benchmarks._subprocesses import python

ROUNDS = 15
BUDGET_S = 0.3

_NO_TORCH = "import sys; sys.exit('torch' in sys.modules)"


def run(rounds: int) -> list[Comparison]:
    """Fresh processes; each also fails when torch has been imported."""
    taken = race(
        {
            "pass": python("pass"),
            "import zoo": python(f"import zoo; {_NO_TORCH}"),
            "zoo --help": python(f"import zoo.cli; zoo.cli.main(['--help']); {_NO_TORCH}"),
            "zoo list": python(f"import zoo.cli; zoo.cli.main(['list']); {_NO_TORCH}"),
        },
        rounds,
    )
    return [
        Comparison(
            name="fresh process",
            contestant=f"`{name}`",
            peer="`python -c pass`",
            values=seconds,
            peer_values=taken["pass"],
            at_most_value=BUDGET_S,
        )
        for name, seconds in taken.items()
        if name != "pass"
    ]
