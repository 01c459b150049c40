#!/bin/sh
# Installs what tests/ops/test_cross.py needs, as Debian or Ubuntu packages: a compiler for aarch64 and an emulator that
# runs its programs. Run it as root. Only `make nightly` asks for it.
set -eu

if [ "$(id -u)" -ne 0 ]; then
    echo "install-cross.sh: run it as root (it calls apt-get)" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends g++ g++-aarch64-linux-gnu qemu-user
command -v aarch64-linux-gnu-g++ qemu-aarch64
