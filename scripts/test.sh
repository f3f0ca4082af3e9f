#!/usr/bin/env bash
# Run every test; arguments go to pytest (paths are seen from the top of this copy).
# usage: test.sh [pytest arguments]      e.g. test.sh queue-py -k recovery
# TEST_WORKERS: how many processes share the files (3: tests of real nodes mostly wait); 0 runs all in one, as
# --pdb and -s want it.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

prepare "$VENV" "${SERVICE_REQUIREMENTS[@]}" "$ROOT/testkit/requirements.txt"
cd "$ROOT"
# Some hundred nodes are started below: none of them shall compile its service again.
unset PYTHONDONTWRITEBYTECODE
exec "$VENV/bin/python" -m pytest -q --durations=15 --durations-min=1 \
  -n "${TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder -p testkit.ordering "$@"
