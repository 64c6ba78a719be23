#!/usr/bin/env bash
# The same as ./start.sh, without setting up again.
#
#   ./restart.sh [test|shell|COMMAND...]   see ./start.sh --help

set -euo pipefail
exec "$(dirname -- "${BASH_SOURCE[0]}")/start.sh" --no-setup "$@"
