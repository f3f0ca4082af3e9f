#!/usr/bin/env bash
# Start one cluster or all four in the background, wait until each node is ready, and say where they are.
# usage: start.sh [all|lock|queue|cache|secure]
# PYTHON=… chooses the interpreter, PORT_BASE=… moves the ports (8000), START_TIMEOUT=… seconds to wait (60).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

service_argument start.sh "$@"
prepare "$VENV" "${SERVICE_REQUIREMENTS[@]}"
nodes start "$SERVICE"
