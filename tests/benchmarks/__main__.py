"""The command: run benchmarks, keep the results as JSON, write them into the README."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.benchmarks import _harness as harness
from zoo.errors import ZooError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 done, 1 a target missed under `--strict`, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "topic", nargs="+", help=f"all, or any of: {', '.join(harness.topics())}", metavar="NAME"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results in this file")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="with --json: write its table into this README"
    )
    parser.add_argument("--rounds", type=int, help="fewer make a quick look, not a figure")
    parser.add_argument("--strict", action="store_true", help="status 1 when a target is missed")
    options = parser.parse_args(arguments)
    if options.readme and not options.json:
        parser.error("--readme writes what is in the results file; name it with --json")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    names = list(harness.topics()) if "all" in options.topic else options.topic
    reports = []
    try:
        for name in names:
            reports.append(harness.measure(name, options.rounds))
            print(harness.as_text(reports[-1]), flush=True)
            if options.json:
                kept = harness.write_reports(options.json, reports)
        if options.readme:
            harness.update_readme(options.readme, kept)
    except ZooError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return int(options.strict and not all(report.met for report in reports))


if __name__ == "__main__":
    sys.exit(main())
