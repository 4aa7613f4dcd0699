#!/usr/bin/env bash
# Packs a finished run into one file that reproduces its rows to the digit: selectors (safetensors),
# anchors, pools, picks by question_id, record, and the hashes of everything it needs besides.
#
#   bash scripts/bundle.sh RUN [FILE]
#
# RUN: its EXP_NAME, a folder under results/<data set>/icl_inference, or a path.
# FILE: where it goes; else results/<data set>/bundles/<run>.zip.
# -n, --dry-run: say what would be packed.   -h, --help: this text and every setting.
#
# Example:
#   bash scripts/bundle.sh exp1
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 2 lever_plus.release.pack -- "$@"
setup_python
exec "$PYTHON" -m lever_plus.release.pack ${ARGS[@]+"${ARGS[@]}"} ${DRY_RUN[@]+"${DRY_RUN[@]}"}
