#!/usr/bin/env bash
# Reproduces the rows of a bundle (see bundle.sh) with the data set and the model at hand, to the
# digit, and says what does not match.
#
#   bash scripts/reproduce.sh BUNDLE [METHOD ...]
#
# METHOD: only these rows (v3, v2, similarity, ...); else all.
# -n, --dry-run: check bundle, data set and model.   -h, --help: this text and every setting.
#
# Example:
#   bash scripts/reproduce.sh results/mini_okvqa/bundles/exp1.zip v3
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 99 lever_plus.release.reproduce -- "$@"
setup_python
exec "$PYTHON" -m lever_plus.release.reproduce ${ARGS[@]+"${ARGS[@]}"} ${DRY_RUN[@]+"${DRY_RUN[@]}"}
