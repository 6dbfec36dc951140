#!/usr/bin/env bash
# Installs the project with its tests and runs what must pass: lint, types, fast tests.
# Arguments go to pytest: bash ci/test.sh -m slow
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install -e ".[dev]"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
if [ "$#" -eq 0 ]; then
  set -- -m "not slow and not network"
fi
"$venv/bin/python" -m pytest "$@"
