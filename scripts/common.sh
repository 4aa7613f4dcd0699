# Sourced by every entry point: strict mode, the repository's root, .env, Python, help and options.
case "$(<"${BASH_SOURCE[0]}")" in *$'\r'*) echo "error: this copy has Windows line ends; clone it again (git keeps Unix ones here)" >&2; exit 2 ;; esac #
set +o posix +o noclobber +o noglob # the shell's options and variables may come from the environment
unset CDPATH GLOBIGNORE PYTHONSAFEPATH LEVER_USUAL
set -Eeuo pipefail
ROOT="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
SCRIPT="$(basename -- "$(readlink -f "${BASH_SOURCE[1]:-$0}")")"
CALLER_DIR="$PWD"
cd "$ROOT"
trap 'code=$?; [ "$code" -ge 1 ] && [ "$code" -le 5 ] || [ "$code" -ge 128 ] || echo "error: $SCRIPT: line $LINENO stopped with exit code $code" >&2' ERR

fail() { # fail EXIT_CODE MESSAGE
  local message="${2//[[:cntrl:]]/?}"
  printf 'error: %s\n' "${message:0:600}" >&2
  exit "$1"
}

load_dotenv() { # load_dotenv FILE [or-empty]: fills what the environment leaves unset; Python's reader is the only one
  [ -e "$1" ] || [ -L "$1" ] || return 0
  local python assignments
  python="$(command -v python3 || command -v python)" || fail 3 "Python 3.11 or newer not found; it reads $1"
  assignments="$("$python" -I lever_plus/dotenv.py "$@")" || exit
  eval "$assignments"
}

has_requirements() { # has_requirements PYTHON: every pinned package is importable, the large ones in their version
  "$1" - "$ROOT/requirements.txt" 2>/dev/null <<'PY'
import re, sys
from importlib import metadata
if sys.version_info < (3, 11):
    sys.exit(1)
for line in open(sys.argv[1]):
    name, _, version = line.split("#")[0].strip().partition("==")
    if not name:
        continue
    try:
        there = metadata.version(name)
    except metadata.PackageNotFoundError:
        sys.exit(1)
    if name in ("torch", "transformers", "deepspeed") and re.split(r"[.+]", there)[:2] != re.split(r"[.+]", version)[:2]:
        sys.exit(1)
PY
}

find_python() { # a Python that can make the virtual environment
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail 3 "Python 3.11 or newer not found; install it, or activate a conda environment that has it"
}

venv_is_ready() { # venv_is_ready HASH: .venv was made from this requirements.txt, or by someone else with all that it asks for
  local stamp
  stamp="$(cat .venv/.requirements 2>/dev/null || true)"
  [ "$stamp" = "$1" ] || { [ -z "$stamp" ] && has_requirements "$PYTHON"; }
}

make_venv() { # make_venv HASH: once, however many scripts wait for it
  local maker
  [ -w "$ROOT" ] || fail 3 "no Python here has the packages of requirements.txt, and .venv cannot be made: $ROOT is not yours to write to; activate an environment that has them"
  maker="$(find_python)" || exit
  exec 9>>"$ROOT/.venv.lock"
  flock 9
  if ! venv_is_ready "$1"; then
    echo "setting up .venv from requirements.txt (once; about 1.5 GB)"
    "$maker" -m venv .venv || fail 3 "$maker cannot make $ROOT/.venv; remove what is there, or activate an environment that has the packages of requirements.txt"
    "$PYTHON" -m pip install -q --disable-pip-version-check -r requirements.txt ||
      fail 3 "installing requirements.txt failed; see README, Troubleshooting, and run the same command again"
    echo "$1" >.venv/.requirements
  fi
  flock -u 9
  exec 9>&-
}

setup_python() { # sets PYTHON: the active environment where it has the requirements, else .venv (made where missing)
  local active want
  active="$(command -v python || command -v python3 || true)"
  if [ -n "$active" ] && has_requirements "$active"; then
    PYTHON="$active"
  else
    want="$(sha256sum requirements.txt | cut -d' ' -f1)"
    PYTHON="$ROOT/.venv/bin/python"
    venv_is_ready "$want" || make_venv "$want"
  fi
  export PYTHON PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
}

usage() { # usage MODULE…: the script's head comment, then the live settings of the stages, each once
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$ROOT/scripts/$SCRIPT"
  local python="$ROOT/.venv/bin/python" module stages=()
  [ -x "$python" ] || python="$(command -v python3 || true)"
  for module in "$@"; do
    case "$module" in
      *.benchmark_*) echo && "$python" -m "$module" --help 2>/dev/null || echo "(options of $module: shown once the requirements are installed)" ;;
      *) stages+=("$module") ;;
    esac
  done
  [ "${#stages[@]}" -eq 0 ] || "$python" -m lever_plus.settings.help "${stages[@]}" 2>/dev/null ||
    echo "(the settings are shown once the requirements are installed)"
}

parse_args() { # parse_args MAX MODULES -- "$@": -h/--help, -n/--dry-run, --assume SIZE; sets ARGS and DRY_RUN, refuses other options
  local max="$1" modules="$2" word take=""
  shift 3
  ARGS=() DRY_RUN=()
  for word in "$@"; do
    if [ -n "$take" ]; then export "$take=$word" && take=""; continue; fi
    case "$word" in
      -h | --help) usage $modules; exit 0 ;;
      -n | --dry-run) DRY_RUN=(--dry-run) ;;
      --assume) take=ASSUME ;;
      --assume=*) export ASSUME="${word#*=}" ;;
      -[0-9]*) ARGS+=("$word") ;;
      -*) fail 2 "$SCRIPT: unknown option $word (see --help)" ;;
      [A-Z]*=*)
        if [[ "$modules" =~ \.stages\.|\.run$|\.doctor$ && "$word" =~ ^[A-Z][A-Z0-9_]*= ]]; then # elsewhere it may name a run
          fail 2 "$SCRIPT: settings stand before the command: $word bash scripts/$SCRIPT …"
        fi
        ARGS+=("$word")
        ;;
      *) ARGS+=("$word") ;;
    esac
  done
  [ -z "$take" ] || fail 2 "$SCRIPT: --assume needs okvqa or vqav2"
  [ "${#ARGS[@]}" -le "$max" ] || fail 2 "$SCRIPT: too many arguments (at most $max; see --help)"
}

arg() { # arg NUMBER DEFAULT: a positional argument
  local index=$(($1 - 1))
  echo "${ARGS[$index]:-$2}"
}

usual() { # usual NUMBER NAME: where neither the argument nor the variable is given, a small data set may lower the script's default
  [ -n "$(arg "$1" "${!2:-}")" ] || export LEVER_USUAL="$2"
}

check_task() {
  [ "$1" = vqa ] || fail 2 "task $1 is not supported: the first argument is vqa (captioning is out of scope)"
}

pipeline() { # pipeline TARGET: build it and what it needs, in this script's place: a signal to the script reaches it
  setup_python
  exec "$PYTHON" -m lever_plus.pipeline "$@" ${DRY_RUN[@]+"${DRY_RUN[@]}"}
}

load_dotenv .env
