#!/bin/sh
# Fill a folder with what runs the agent as an ARM64 CPU does: `sh arm64_root.sh FOLDER`, as root, on Debian or Ubuntu.
# Needs: apt-get install qemu-user debootstrap; MIRROR is of Debian, debootstrap's own if unset. PYTHON (python3 if unset) is the one that has Potstill: its versions of
# onnxruntime and numpy are fetched for ARM64. One folder of links for each CPU, with the /proc/cpuinfo that is its own:
# ONNX Runtime chooses its kernels by the part number there.
set -eu
root=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-python3}

[ -d "$root/system/usr/bin" ] || debootstrap --foreign --arch=arm64 --variant=minbase \
    --include=python3,libstdc++6,libgomp1 bookworm "$root/system" ${MIRROR:+"$MIRROR"}
for package in "$root"/system/var/cache/apt/archives/*.deb; do
    dpkg -x "$package" "$root/system"
done

rm -rf "$root/wheels" "$root/system/opt/packages"
wanted=$("$python" -c '
from importlib.metadata import version
print(*(f"{name}=={version(name)}" for name in ("onnxruntime", "numpy", "flatbuffers", "protobuf", "packaging")))')
minor=$(ls "$root/system/usr/bin" | sed -n 's/^python3\.\([0-9]*\)$/\1/p')
# shellcheck disable=SC2086
"$python" -m pip download --quiet --no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_27_aarch64 --python-version "3.$minor" --dest "$root/wheels" $wanted
for wheel in "$root"/wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" "$root/system/opt/packages"
done

cpu() {  # name, part number, further features
    mkdir -p "$root/$1/proc" "$root/$1/sys/devices/system/cpu"
    for folder in usr lib opt etc; do
        ln -sfn "../system/$folder" "$root/$1/$folder"
    done
    echo 0 > "$root/$1/sys/devices/system/cpu/possible"
    echo 0 > "$root/$1/sys/devices/system/cpu/present"
    cat > "$root/$1/proc/cpuinfo" <<END
processor	: 0
BogoMIPS	: 50.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32$3 cpuid
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x0
CPU part	: $2
CPU revision	: 4

END
}
cpu cortex-a53 0xd03 ""
cpu cortex-a76 0xd0b " atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
cpu max,sme=off,sve-default-vector-length=16 0xd4d " atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp i8mm bf16"
echo "export POTSTILL_ARM64_ROOT=$root"
