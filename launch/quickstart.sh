#!/usr/bin/env bash
# The main job on embedded defaults, from seeds to a served reply: no GPU, no key, no download but packages.
# About 2 minutes to install, then 4 to 6 on two cores. `--keep` leaves the server up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh all
exec "${GRAFT_VENV:-.venv}/bin/graft" run configs/recipes/image-intent-tiny.toml "$@"
