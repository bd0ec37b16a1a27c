#!/usr/bin/env bash
# Set up when needed, then every check: lint, format, types, layers, dependencies, tests. Arguments go to pytest.
# --fast as the first one leaves out the tests that are marked slow: trainings in other processes, kills, fuzzing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
PATH=$PWD/.venv/bin:$PATH

# Run one check; its output is shown only when it fails.
check() {
    local name=$1 log
    shift
    log=$(mktemp)
    if ! "$@" > "$log" 2>&1; then
        cat "$log"
        rm -f "$log"
        echo "check: $name failed: $*" >&2
        return 1
    fi
    rm -f "$log"
    echo "check: $name ok"
}

check lint ruff check .
check format ruff format --check .
check types mypy curate pipelines scripts
check layers lint-imports --no-cache
check dependencies deptry .
chosen=()
if [[ ${1:-} == --fast ]]; then
    shift
    chosen=(-m "not slow and not browser and not soak")
fi
exec pytest -q -n 2 --dist worksteal "${chosen[@]}" "$@"
