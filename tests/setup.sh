#!/bin/bash
# Installs what Hostler needs on a Debian 12 machine, as far as it is missing.
#
#   setup.sh run    to build images and to run the demo
#   setup.sh repeat also what `make test-repeat` reads their results with
#   setup.sh test   also what the tests use as independent parts
#   setup.sh bench  what `make bench` compares with
#   setup.sh lint   what `make lint` uses
#   setup.sh fuzz   what `make fuzz` uses
#
# Says what it installs. Without root it installs nothing, and says what is missing.
set -euo pipefail

what=${1:?run, repeat, test, bench, lint or fuzz}
# What is there may be where an ordinary user does not look; and apt is to speak English to this.
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C.UTF-8

missing=()
# need COMMAND-OR-FILE PACKAGE: the package, unless the thing is there already.
need() {
    case $1 in
    /*) [ -e "$1" ] || missing+=("$2") ;;
    *) command -v "$1" >/dev/null || missing+=("$2") ;;
    esac
}

if [ "$what" = repeat ]; then
    need sfdisk fdisk
    what=run
fi

if ! command -v cargo >/dev/null; then
    echo "setup: cargo is missing; install Rust 1.91 or newer (Debian 12's own is too old), for example with rustup" >&2
    exit 5
fi

need cc gcc
[ "$what" = fuzz ] && need c++ g++
need /usr/include/string.h libc6-dev
need make make
need git git
need /etc/ssl/certs/ca-certificates.crt ca-certificates
if [ "$what" != lint ]; then
    need mke2fs e2fsprogs
    need losetup mount
    need findmnt util-linux
    need setpriv util-linux
    need ps procps
fi
if [ "$what" = test ] || [ "$what" = bench ]; then
    need lsof lsof
fi
if [ "$what" = bench ]; then
    need nginx nginx-light
    need apt-cacher-ng apt-cacher-ng
    need squid squid
fi
if [ "$what" = run ] || [ "$what" = test ]; then
    need gpgv gpgv
    need /usr/share/keyrings/debian-archive-keyring.gpg debian-archive-keyring
    need /usr/share/seabios/bios-256k.bin seabios
fi
if [ "$what" = test ]; then
    need gpg gnupg
    need prometheus prometheus
    need promtool prometheus
    need systemd-analyze systemd
    need python3 python3
    need mkfs.btrfs btrfs-progs
    need debootstrap debootstrap
    need createrepo_c createrepo-c
    need rpmbuild rpm
    need dnf dnf
    need zckdl zchunk
    need sqfstar squashfs-tools
    need xorriso xorriso
    need xmllint libxml2-utils
    # The Python client of Varlink goes into a virtual environment of the test's own.
    python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
fi
if [ "$what" != run ]; then
    # loopdev-3, the tests' independent view of loop devices, generates its bindings with it.
    ls /usr/lib/llvm-*/lib/libclang.so* >/dev/null 2>&1 || missing+=(libclang-dev)
fi
if [ "$what" = lint ]; then
    need systemd-analyze systemd
    need promtool prometheus
    need shellcheck shellcheck
fi

# qemu and qemu-img must be of one version; on some machines a newer qemu-utils is there already.
qemu_version() { { "$1" --version 2>/dev/null || true; } | sed -n "1s/.*version \([0-9.]*\).*/\1/p"; }
if [ "$what" = run ] || [ "$what" = test ]; then
    machine=$(qemu_version qemu-system-x86_64)
    image=$(qemu_version qemu-img)
    if [ -z "$machine" ] || [ "$machine" != "$image" ]; then
        missing+=(qemu-system-x86 qemu-utils)
    fi
fi

if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" != 0 ]; then
        echo "setup: missing: ${missing[*]}; install them (apt-get install ${missing[*]}), or run this as root" >&2
        exit 5
    fi
    echo "setup: installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -o DPkg::Lock::Timeout=300 update -qq
    packages=()
    for package in $(printf '%s\n' "${missing[@]}" | sort -u); do
        case $package in
        qemu-system-x86 | qemu-utils)
            version=$(apt-cache policy qemu-system-x86 | sed -n 's/^  Candidate: //p')
            packages+=("$package=$version")
            ;;
        *) packages+=("$package") ;;
        esac
    done
    apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends --allow-downgrades "${packages[@]}" >/dev/null
fi

# These packages start a service; what is compared runs its own, and a bench leaves none behind.
if [ "$what" = bench ] && [ -d /run/systemd/system ]; then
    for package in ${missing[@]+"${missing[@]}"}; do
        case $package in
        nginx-light) systemctl disable --quiet --now nginx ;;
        apt-cacher-ng | squid) systemctl disable --quiet --now "$package" ;;
        esac
    done
fi

if [ "$what" = lint ] && ! cargo deny --version >/dev/null 2>&1; then
    echo "setup: installing cargo-deny"
    cargo install --locked --quiet --debug cargo-deny
fi

if [ "$what" = fuzz ]; then
    if ! cargo +nightly --version >/dev/null 2>&1; then
        echo "setup: fuzzing needs a nightly compiler; install one with \`rustup toolchain install nightly\`" >&2
        exit 5
    fi
    if ! cargo fuzz --version >/dev/null 2>&1; then
        echo "setup: installing cargo-fuzz"
        cargo install --locked --quiet cargo-fuzz
    fi
fi
