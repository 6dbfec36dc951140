#!/usr/bin/env bash
# Installs the project with its tests and runs what must pass: lint, types, fast tests.
# Arguments go to pytest: bash ci/test.sh -m slow
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install -e ".[dev]"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
if [ "$#" -eq 0 ]; then
  # Two processes, each on one thread; a file's tests stay together, since they share what they train.
  set -- -m "not slow and not network" --numprocesses 2 --dist loadfile
fi
"$venv/bin/python" -m pytest "$@"
