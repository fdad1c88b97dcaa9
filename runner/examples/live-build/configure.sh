#!/bin/sh
# What the live system is: configure.sh MIRROR
#
# The other archives that live-build knows by heart are out of the machine's reach. A well-packed file
# system takes hours where a processor is emulated, so this one is packed fast.
lb config \
    --distribution bookworm \
    --mirror-bootstrap "$1" \
    --mirror-chroot "$1" \
    --mirror-binary "$1" \
    --security false \
    --updates false \
    --apt-recommends false \
    --apt-indices false \
    --archive-areas main \
    --debian-installer none \
    --firmware-chroot false \
    --memtest none \
    --win32-loader false \
    --bootloaders syslinux \
    --binary-images iso-hybrid \
    --chroot-squashfs-compression-type zstd \
    --chroot-squashfs-compression-level 1
mkdir -p config/package-lists
echo "live-boot live-config systemd-sysv" >config/package-lists/live.list.chroot
