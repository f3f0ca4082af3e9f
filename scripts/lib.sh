# shellcheck shell=bash
# What the scripts beside this file share; they source it. Written for bash 3.2, which macOS still ships.
# Its twin for PowerShell is lib.ps1.

unset CDPATH
SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$SCRIPTS")
VENV=$ROOT/.venv
SERVICE_NAMES="lock queue cache secure"
# Read by whoever sources this file.
# shellcheck disable=SC2034
SERVICE_REQUIREMENTS=(
  "$ROOT/distributed-lock-py/requirements.txt"
  "$ROOT/queue-py/requirements.txt"
  "$ROOT/cache-py/requirements.txt"
  "$ROOT/secure-app-py/requirements.txt"
)

# die MESSAGE...: one line on stderr, exit 1.
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# service_argument SCRIPT "$@": sets SERVICE (default all); anything else is answered with the usage.
service_argument() {
  local script=$1 usage
  shift
  usage="usage: $script [all|${SERVICE_NAMES// /|}]"
  case "${1:-}" in -h | --help)
    printf '%s\n' "$usage"
    exit 0
    ;;
  esac
  SERVICE=${1:-all}
  case " all $SERVICE_NAMES " in
    *" $SERVICE "*) [ $# -gt 1 ] || return 0 ;;
    *) printf 'error: unknown service "%s"\n' "$SERVICE" >&2 ;;
  esac
  printf '%s\n' "$usage" >&2
  exit 2
}

# find_python: prints an interpreter that is new enough and able to make environments. PYTHON decides if set.
find_python() {
  local candidate answer seen=""
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python; do
    command -v "$candidate" >/dev/null 2>&1 || [ "$candidate" = "${PYTHON:-}" ] || continue
    answer=$("$candidate" -c 'import sys
answer = "ok"
if sys.version_info < (3, 11):
    answer = "is too old"
else:
    try:
        import ensurepip, venv
    except ImportError:
        answer = "has no venv module (Debian, Ubuntu: apt-get install python3-venv)"
print("%d.%d %s" % (sys.version_info[0], sys.version_info[1], answer))' 2>/dev/null) ||
      answer="does not run"
    case $answer in
      *" ok")
        printf '%s\n' "$candidate"
        return 0
        ;;
    esac
    seen="$seen
  $candidate: $answer"
    [ "$candidate" != "${PYTHON:-}" ] || break
  done
  {
    printf 'error: Python 3.11 or newer is needed (every older version is past its end of life). Found:%s\n' \
      "${seen:- no Python at all}"
    printf 'Install one (https://www.python.org/downloads/), or name it: PYTHON=/path/to/python3.12 %s\n' "$0"
  } >&2
  return 1
}

# prepare VENV FILE...: makes the environment VENV and installs FILEs; quick when there is nothing to do.
prepare() {
  local venv=$1 python
  shift
  python=$venv/bin/python
  # An environment that works needs no other Python; environment.py looks at the rest.
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$(find_python) || exit 1
  fi
  "$python" "$SCRIPTS/environment.py" "$venv" "$@"
}

# nodes VERB [SERVICE]: start, stop or list this copy's clusters. Stopping needs no installed packages, so it
# works with any Python when the environment was deleted meanwhile.
nodes() {
  local python=$VENV/bin/python
  [ -x "$python" ] || python=$(find_python) || exit 1
  "$python" "$SCRIPTS/clusters.py" "$@"
}
