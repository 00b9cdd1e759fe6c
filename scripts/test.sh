#!/usr/bin/env bash
# Makes or reuses .venv, installs what the tests need (the retired monai-generative too, to compare with it) and runs them. Arguments go to pytest; paths count from the repository.
#   bash scripts/test.sh [-m "not slow"] [tests/diffusion]
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

prepare_venv test croissant generative labels pacs text ray
cd "$repository"

export MLFLOW_DISABLE_TELEMETRY=true MPLBACKEND=Agg
if [ "$#" -eq 0 ]; then
    # The whole suite: two processes, each with its share of the cores. One file stays in one process, so heavy imports and
    # module fixtures are paid once. For a selection, a second process costs more in imports (about 10 s) than it saves.
    cores="$("$venv/bin/python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
    if [ "$cores" -ge 2 ]; then
        threads=$((cores / 2))
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-$threads}"
        set -- -n 2 --durations=40 --dist loadfile --no-loadscope-reorder  # in the order of tests/conftest.py, not by the number of tests
    fi
fi
exec "$venv/bin/python" -m pytest "$@"
