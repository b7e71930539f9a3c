#!/usr/bin/env bash
# Style, types and layering.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ruff format --check .
ruff check .
mypy
lint-imports --no-logo
