#!/usr/bin/env bash
# Installs the project, then does its main job offline on the bundled checkpoint: re-measures the
# recorded numbers and writes some Shakespeare.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install -e .
export HF_HUB_OFFLINE=1
"$venv/bin/zoo" list
"$venv/bin/zoo" evaluate cached-transformer-lm
"$venv/bin/zoo" generate cached-transformer-lm --prompt "ROMEO:" --seed 1
