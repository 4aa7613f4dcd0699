#!/usr/bin/env bash
# The pipeline on the embedded benchmark, small, again and again in one folder, killed at random
# moments; its products must equal an undisturbed run's byte for byte, and nothing may pile up.
#
#   bash scripts/soak.sh [minutes=60] [seed=0]
#
# Exit code 1: something did not hold. -n, --dry-run.   -h, --help: this text.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 2 "" -- "$@"
set -- --minutes "$(arg 1 60)" --seed "$(arg 2 0)"
[ "${#DRY_RUN[@]}" -eq 0 ] || { echo "would run: python -m tests.soak $*"; exit 0; }
setup_python
exec "$PYTHON" -m tests.soak "$@"
