#!/usr/bin/env bash
# Set up when needed, then every check: lint, format, types, layers, dependencies, tests. Arguments go to pytest.
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
exec pytest -q -n 2 --dist worksteal "$@"
