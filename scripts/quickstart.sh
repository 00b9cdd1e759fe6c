#!/usr/bin/env bash
# Makes .venv, installs medaug and runs the main job on the embedded phantom. Arguments go to `medaug quickstart`.
#   bash scripts/quickstart.sh [--out DIR]
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

prepare_venv
exec "$venv/bin/medaug" quickstart "$@"
