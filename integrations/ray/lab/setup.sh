#!/usr/bin/env bash
# Makes an environment with Ray, with this repository's packages editable.
#   setup.sh VENV     make it in the folder VENV
set -euo pipefail
[ $# = 1 ] || { sed -n '2,3p' "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd); repository=$here/../../..
"${PYTHON:-python3}" -m venv "$1"
"$1/bin/pip" -q --disable-pip-version-check install -c "$repository/constraints.txt" 'ray>=2.50,<3' pytest pytest-timeout \
  -e "$repository[http]" -e "$repository/plugins/ipc" -e "$repository/plugins/nccl" -e "$repository/plugins/rdma" \
  -e "$repository/integrations/ray"
touch "$1/.ready"
