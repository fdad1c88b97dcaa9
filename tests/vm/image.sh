#!/bin/bash
# Prints the folder with the image of the test host, and builds it first where that is needed.
#
#   image.sh HOSTLER WORK
#
# HOSTLER is the program that builds it; WORK is where it is kept, as image-KEY: the key is the digest
# of the recipe and of the runner's version. The folder has disk.raw, and what hostler-vm boots the
# kernel with by itself: vmlinuz, initrd.img and busybox. Needs no root; uses Hostler's cache.
set -euo pipefail

hostler=${1:?the program hostler}
work=${2:?where the image is kept}
recipe=$(dirname "$(realpath "$0")")/host.toml
export PATH=$PATH:/usr/sbin:/sbin

mkdir -p "$work"
# One builds, others wait for it. The lock goes with this process.
exec 9>"$work/image.lock"
flock 9
key=$({ cat "$recipe" && "$hostler" --version; } | sha256sum | cut -c1-16)
image=$work/image-$key
if [ ! -e "$image/complete" ]; then
    echo "image: building the test host; it is kept in $image" >&2
    # What another recipe or a build that was killed left. Nothing else is called so.
    rm -rf "$work"/image-*
    mkdir "$image"
    trap '[ -e "$image/complete" ] || rm -rf "$image"' EXIT
    "$hostler" build "$recipe" --output "$image" >&2
    qemu-img convert -O raw "$image/test-host.qcow2" "$image/disk.raw"
    rm "$image/test-host.qcow2"*
    # The file system is in the image's only partition, which begins at 1 MiB.
    take() { # take FILE AS
        debugfs -R "dump $1 $image/$2" "$image/disk.raw?offset=1048576" 2>/dev/null
        [ -s "$image/$2" ] || {
            echo "image: the image has no $1; see tests/vm/host.toml" >&2
            exit 1
        }
    }
    kernel=$(debugfs -R 'ls -p /boot' "$image/disk.raw?offset=1048576" 2>/dev/null |
        cut -d / -f 6 | sed -n 's/^vmlinuz-//p' | head -n 1)
    take "/boot/vmlinuz-$kernel" vmlinuz
    take "/boot/initrd.img-$kernel" initrd.img
    take /bin/busybox busybox
    touch "$image/complete"
fi
echo "$image"
