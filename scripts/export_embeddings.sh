#!/usr/bin/env bash
# CLIP embeddings of every train item (candidates) and validation item (queries).
#
#   bash scripts/export_embeddings.sh [task=vqa] [dataset=auto] [gpu_id=0]
#
# -n, --dry-run: say what would be done.   -h, --help: this text and every setting.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
case "${1:-}" in */* | *.ckpt | *.pt) fail 2 "this is the original's form; embeddings are CLIP's here, of no selector: bash scripts/export_embeddings.sh vqa ${2:-okvqa_local} ${4:-0}" ;; esac
parse_args 3 lever_plus.stages.export_embeddings -- "$@"
check_task "$(arg 1 vqa)"
export DATASET="$(arg 2 "${DATASET:-auto}")" GPU_ID="$(arg 3 "${GPU_ID:-0}")"
pipeline embeddings
