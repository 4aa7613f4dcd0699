#!/usr/bin/env bash
# Convert a checkpoint or embedding file that holds objects besides tensors and plain data, which
# every other command refuses. No code of the file is run: tensors, numbers and texts are taken
# over, the rest is left out.
#
#   bash scripts/convert_checkpoint.sh --trust FILE [--output NEW]
#
# --trust FILE: you know where the file comes from and want its weights.
# --output NEW: where to write; without it the result takes FILE's place, which is kept as
# FILE.original.
# -n, --dry-run: say what the file is and what would be written.   -h, --help: this text.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
case " $* " in *" -h "* | *" --help "*) usage; exit 0 ;; esac
setup_python
cd "$CALLER_DIR"
exec "$PYTHON" -m lever_plus.stages.convert_checkpoint "$@"
