#!/bin/bash
# Install what build.py packed, on a GPU machine without network. Nothing of the machine's Python is changed.
#
#     bash install.sh --repo CHECKOUT [--pieces DIR] [--into /tmp/headrift-gpu] [--python python3] [--no-check]
#     source /tmp/headrift-gpu/env.sh
#
# --pieces: folder with the pieces and SHA256SUMS (default: that of this script). --no-check: do not import vLLM at the
# end, which needs PyTorch for CUDA. headrift runs from the checkout.
#
# Then, all that can be checked in nine minutes, and after a break what is left of it:
#
#     cd CHECKOUT && python3 -P scripts/gpu_check.py --out results.json
#     cd CHECKOUT && python3 -P scripts/gpu_check.py --out results.json --resume
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pieces=$here into=/tmp/headrift-gpu repo='' python=python3 check=1
while [ $# -gt 0 ]; do
  case $1 in
    --pieces) pieces=$2; shift 2 ;;
    --into) into=$2; shift 2 ;;
    --repo) repo=$(cd "$2" && pwd); shift 2 ;;
    --python) python=$2; shift 2 ;;
    --no-check) check=''; shift ;;
    *) sed -n '2,14p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
  esac
done
[ -n "$repo" ] || { echo "install: --repo CHECKOUT is missing" >&2; exit 2; }
(cd "$pieces" && sha256sum --quiet -c SHA256SUMS) || { echo "install: pieces are missing or damaged in $pieces" >&2; exit 1; }
site=$into/site
rm -rf "$site" "$into/packed"
mkdir -p "$site" "$into/packed"
cat "$pieces"/piece-* | tar -x -C "$into/packed"

# A process for each archive: unpacking xz takes one core. Python's own lzma, for machines without the program xz.
unpack() {
  "$python" - "$1" "$site" <<'PY'
import lzma, pathlib, shutil, sys, tarfile
source, site = map(pathlib.Path, sys.argv[1:])
if source.name.endswith(".tar.xz"):
    with tarfile.open(source) as archive:
        archive.extractall(site, filter="fully_trusted")
else:
    target = site / source.name.removesuffix(".xz").replace("+", "/")
    target.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(source) as packed, target.open("wb") as out:
        shutil.copyfileobj(packed, out, 1 << 20)
PY
}
jobs=()
for packed in "$into"/packed/*; do
  unpack "$packed" &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done
rm -rf "$into/packed"

# What `pip install -e` would register: the plugin by which vLLM finds headrift.
mkdir -p "$into/checkout/headrift-0.dist-info"
"$python" - "$repo" "$into/checkout/headrift-0.dist-info" <<'PY'
import pathlib, sys, tomllib
repo, info = map(pathlib.Path, sys.argv[1:])
project = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))["project"]
(info / "METADATA").write_text("Metadata-Version: 2.1\nName: headrift\nVersion: 0\n")
groups = {"console_scripts": project["scripts"], **project["entry-points"]}
lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups.items()]
(info / "entry_points.txt").write_text("\n".join(lines))
PY
cat > "$into/env.sh" <<ENV
export PYTHONPATH=$repo/engine:$repo/kernels:$into/checkout:$site\${PYTHONPATH:+:\$PYTHONPATH}
# The root of a checkout stays off sys.path: its folder datasets/ would pass for the library.
export PYTHONSAFEPATH=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# One machine, perhaps without a network interface other than the loopback.
export VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo
# FlashInfer is not in the bundle.
export VLLM_USE_FLASHINFER_SAMPLER=0
export VLLM_CACHE_ROOT=$into/cache/vllm TRITON_CACHE_DIR=$into/cache/triton TORCHINDUCTOR_CACHE_DIR=$into/cache/inductor
ENV
source "$into/env.sh"
if [ -n "$check" ]; then
  "$python" - <<'PY'
import importlib.metadata as metadata
import torch, vllm._C_stable_libtorch, vllm
from vllm.vllm_flash_attn import is_fa_version_supported
plugins = [entry.name for entry in metadata.entry_points(group="vllm.general_plugins")]
print(f"install: vLLM {metadata.version('vllm')}, torch {torch.__version__}, GPU {torch.cuda.is_available()}, "
      f"FlashAttention 3 {is_fa_version_supported(3)}, plugins {plugins}")
PY
fi
echo "install: done in $SECONDS s; now: source $into/env.sh"
