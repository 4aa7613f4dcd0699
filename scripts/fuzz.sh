#!/usr/bin/env bash
# Damaged files, hostile environments and command lines, thousands a minute: every reader takes them
# or refuses them with one line and its exit code, writes nothing else and starts nothing.
#
#   bash scripts/fuzz.sh [minutes=10] [seed=the day's]
#
# Each kind of finding is printed once with the case that shows it; its input is kept in
# results/fuzz/. Exit code 1: something was found. -n, --dry-run.   -h, --help: this text.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 2 "" -- "$@"
set -- --minutes "$(arg 1 10)" --seed "$(arg 2 "$(date +%Y%m%d)")" --out results/fuzz
[ "${#DRY_RUN[@]}" -eq 0 ] || { echo "would run: python -m tests.fuzz $*"; exit 0; }
setup_python
exec "$PYTHON" -W ignore -m tests.fuzz "$@"
