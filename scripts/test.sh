#!/usr/bin/env bash
# Sets up Python, then lint and the test suite.
#
#   bash scripts/test.sh [pytest arguments]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
case "${1:-}" in -h | --help) usage; exit 0 ;; -n | --dry-run) echo "would run: ruff check . && pytest ${*:2}"; exit 0 ;; esac
setup_python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -n "${TEST_PROCS:-auto}" --dist loadscope "$@"
