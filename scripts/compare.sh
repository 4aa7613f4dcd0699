#!/usr/bin/env bash
# Finished runs side by side, paired on the queries they share.
#
#   bash scripts/compare.sh A B [C …]
#
# A run: its EXP_NAME, a folder under results/<data set>/icl_inference, or a path;
# RUN:METHOD for a method other than its first (v3); RUN,RUN,RUN[:METHOD]: training seeds of one
# recipe, with intervals over queries and seeds. Without runs: lists them. Runs of different
# data sets, models or prompts are refused. Writes Markdown, HTML, JSON and CSV into
# experiments/compare_<runs>, or compare_<EXP_NAME> where that is set.
# -h, --help: this text and every setting.
#
# Example:
#   bash scripts/compare.sh exp1 best best:v2
#   bash scripts/compare.sh try_seed1,try_seed2,try_seed3 try_seed1:label
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 99 lever_plus.experiments.compare -- "$@"
setup_python
exec "$PYTHON" -m lever_plus.experiments.compare ${ARGS[@]+"${ARGS[@]}"} ${DRY_RUN[@]+"${DRY_RUN[@]}"}
