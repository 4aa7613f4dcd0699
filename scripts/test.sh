#!/usr/bin/env bash
# Sets up Python, then lint and the test suite.
#
#   bash scripts/test.sh [pytest arguments]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
case "${1:-}" in -h | --help) usage; exit 0 ;; -n | --dry-run) echo "would run: ruff check . && pytest ${*:2}"; exit 0 ;; esac
setup_python
DATA="$ROOT/.test-data"
if [ "$(cat "$DATA/.requirements" 2>/dev/null || true)" != "$(cat tests/requirements.txt)" ]; then
  "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps --upgrade --target "$DATA" -r tests/requirements.txt &&
    cp tests/requirements.txt "$DATA/.requirements" ||
    echo "warning: tests/requirements.txt could not be installed; the tests of the published folders will be skipped" >&2
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest -n "${TEST_PROCS:-auto}" --dist loadscope --no-loadscope-reorder "$@"
