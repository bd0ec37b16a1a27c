#!/usr/bin/env bash
# Make .venv inside this clone with the pinned packages of requirements.lock, or reuse it when nothing has changed.
# An environment whose installation was cut off is made anew (pip's cache keeps what was downloaded).
# PYTHON=... picks the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/curate.stamp           # what was installed last
unfinished=.venv/curate.unfinished # stands while an installation runs
wanted=$(cat requirements.lock pyproject.toml scripts/setup.sh | sha256sum | cut -d ' ' -f 1)

supported() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2> /dev/null
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        supported "$PYTHON" && echo "$PYTHON" && return
        echo "setup: PYTHON=$PYTHON is not a Python >= 3.11 and < 3.14 with venv; name another one" >&2
        return 1
    fi
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python >= 3.11 and < 3.14 with venv was found; install one, or name it: PYTHON=/path/to/python3.12" >&2
    return 1
}

# Run pip quietly; show what it said only when it fails.
pip_install() {
    local log
    log=$(mktemp)
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input "$@" > "$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        echo "setup: pip could not install ($*); once the cause above is gone, run the same command again" >&2
        return 1
    fi
    rm -f "$log"
}

# A virtual environment that works, was made at this path, and in which no installation was cut off.
usable() {
    supported .venv/bin/python && .venv/bin/python -m pip --version > /dev/null 2>&1 \
        && grep -qF "$PWD/.venv" .venv/bin/activate && [[ ! -e $unfinished ]]
}

if usable && [[ -f $stamp && $(< "$stamp") == "$wanted" ]]; then
    exit 0
fi

if ! usable; then
    python=$(find_python)
    "$python" -m venv --clear .venv
fi
rm -f "$stamp"
touch "$unfinished"
echo "setup: installing $(grep -c == requirements.lock) pinned packages into .venv (several minutes the first time)"
pip_install --upgrade pip
pip_install -r requirements.lock
pip_install --no-deps --no-build-isolation --editable .
echo "$wanted" > "$stamp"
rm "$unfinished"
