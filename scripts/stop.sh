#!/usr/bin/env bash
# Stop what start.sh started, and nothing else. Data stays under .run/<service>/data.
# usage: stop.sh [all|lock|queue|cache|secure]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

service_argument stop.sh "$@"
nodes stop "$SERVICE"
