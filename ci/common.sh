# Sourced by the scripts beside it: makes a virtual environment and installs the project into it.
#
# PYTHON chooses the interpreter (python3), ZOO_VENV the folder (.venv).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${ZOO_VENV:-.venv}

install() {
  if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
  fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c ci/constraints.txt "$@"
}
