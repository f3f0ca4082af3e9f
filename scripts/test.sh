#!/usr/bin/env bash
# Run every test; arguments go to pytest (paths are seen from the top of this copy).
# usage: test.sh [pytest arguments]      e.g. test.sh queue-py -k recovery
# TEST_WORKERS: how many processes share the files (2); 0 runs all in one, as --pdb and -s want it.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

prepare "$VENV" "${SERVICE_REQUIREMENTS[@]}" "$ROOT/testkit/requirements.txt"
cd "$ROOT"
exec "$VENV/bin/python" -m pytest -q --durations=15 --durations-min=1 \
  -n "${TEST_WORKERS:-2}" --dist loadfile "$@"
