#!/usr/bin/env bash
# Finished runs side by side, paired on the queries they share.
#
#   bash scripts/compare.sh A B [C …]
#
# A run is a folder under results/<data set>/icl_inference (its name, or a path), RUN:METHOD for a method other
# than its first (v3). Runs of different data sets, models or prompts are refused.
# -h, --help: this text and every setting.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 99 lever_plus.experiments.compare -- "$@"
[ "${#ARGS[@]}" -ge 2 ] || fail 2 "$SCRIPT: name at least two runs (see --help)"
setup_python
"$PYTHON" -m lever_plus.experiments.compare "${ARGS[@]}" ${DRY_RUN[@]+"${DRY_RUN[@]}"}
