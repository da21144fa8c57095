#!/usr/bin/env bash
# Unpacks Debian's arm64 Python 3.11 with ai-edge-litert and NumPy, to run under
# qemu-user-static: `.ci/arm_root.sh [DIRECTORY]`, by default where the tests look.
#
# It installs nothing on this machine and needs no root. The packages come from this
# machine's sources, which must be those of Debian 12. apt checks their signatures, pip the
# wheels' hashes.
set -euo pipefail

readonly ROOT=${1:-${KERAS_MHA_ARM_ROOT:-${XDG_CACHE_HOME:-$HOME/.cache}/keras-mha/arm64}}
readonly PYTHON=${PYTHON:-python3}
need() {
    echo "$0 needs $1. On Debian: apt-get install $2" >&2
    exit 1
}
command -v qemu-aarch64-static >/dev/null || need qemu-aarch64-static qemu-user-static
command -v apt-get >/dev/null || need apt-get apt
command -v dpkg-deb >/dev/null || need dpkg-deb dpkg
sources=
for file in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
    if [[ -z $sources ]] && grep -qs bookworm "$file"; then
        sources=$file
    fi
done
[[ -n $sources ]] || { echo "$0 needs Debian 12 (bookworm) in /etc/apt" >&2; exit 1; }

# The same version as on this machine, so that results are comparable. NumPy only carries
# the arrays.
version=$("$PYTHON" -c 'import importlib.metadata as m; print(m.version("ai-edge-litert"))')
readonly WHEELS=("ai-edge-litert==$version" numpy flatbuffers)
if [[ -e $ROOT/versions && $(<"$ROOT/versions") == "${WHEELS[*]}" ]]; then
    echo "$ROOT is there already: ${WHEELS[*]}"
    exit 0
fi

mkdir -p "$(dirname "$ROOT")"
work=$(mktemp -d "$(dirname "$ROOT")/.arm-root-XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/apt/{lists,archives}/partial "$work/root/proc"
touch "$work/apt/status"
mkdir "$work/apt/sources"
cp "$sources" "$work/apt/sources/debian.${sources##*.}"
# In this separate state no package counts as installed, so apt downloads every dependency.
cat >"$work/apt/apt.conf" <<EOF
APT::Architecture "arm64";
APT::Architectures "arm64";
APT::Sandbox::User "";
Dir::Cache "$work/apt";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$work/apt/sources";
Dir::State::lists "$work/apt/lists";
Dir::State::status "$work/apt/status";
EOF
export APT_CONFIG=$work/apt/apt.conf

echo "Downloading Debian's arm64 Python 3.11"
apt-get --quiet=2 update
apt-get --quiet=2 install --download-only --yes --no-install-recommends \
    python3.11-minimal libpython3.11-stdlib libstdc++6
for package in "$work"/apt/archives/*.deb; do
    dpkg-deb --extract "$package" "$work/root"
done

echo "Downloading ${WHEELS[*]} for aarch64"
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps \
    --target "$work/root/usr/lib/python3/dist-packages" \
    --only-binary :all: --implementation cp --python-version 3.11 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
    "${WHEELS[@]}"

# ai-edge-litert reads the processor's features here, and crashes on those of x86.
cat >"$work/root/proc/cpuinfo" <<'EOF'
processor	: 0
BogoMIPS	: 100.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: 0xd0b
CPU revision	: 1

EOF
echo "${WHEELS[*]}" >"$work/root/versions"
chmod 755 "$work/root"
if [[ -e $ROOT ]]; then
    [[ -e $ROOT/versions ]] || { echo "$ROOT is something else: remove it" >&2; exit 1; }
    mv "$ROOT" "$work/old"
fi
mv "$work/root" "$ROOT"
echo "$ROOT: ${WHEELS[*]}"
