#!/usr/bin/env bash
# Set up when needed, then run the demonstration: `bash scripts/demo.sh [--seed N]`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m pipelines.demo "$@"
