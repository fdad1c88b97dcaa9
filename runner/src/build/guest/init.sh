#!/bin/busybox sh
# The builder guest's process 1: works in a root file system that the host has unpacked.
#
# It talks over the virtio port org.hostler.control, one line at a time: `stage NAME`,
# `fail STEP STATUS`, and at the very end `done NONCE`. Nothing else counts as success. What the
# steps print goes to the serial console, for people.
#
# The host put next to this script: /modules/order and the modules, /hostler/nonce,
# /hostler/settings, /hostler/steps/* (run in the chroot, in the order of their names) and
# /hostler/files (copied to /run/hostler in the chroot).
#
# No step can deliver the proof by accident. A chroot keeps nothing of root's: /proc/1/root leads out
# of it. So the nonce's file is gone before the first step, and the nonce is only in this shell's own
# memory, not in its environment. And the port can be opened once at a time, which is here, until the
# end. What remains is root that reads this shell's memory and takes its descriptor on purpose: that
# is the recipe's own author, who need not cheat.

/bin/busybox mkdir -p /proc /sys /dev /target
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts

finish() {
    # Closing the port would drop what the host has not read yet, so the descriptor stays open
    # until the power is gone.
    poweroff -f
    sleep 60
}

fail() {
    echo "hostler: step $1 failed with status $2"
    [ -c "$port" ] && echo "fail $1 $2" >&3
    sync
    # Asked for with --shell-on-failure: a person looks at what there is, on the serial console.
    if grep -qw hostler.shell /proc/cmdline; then
        echo "hostler: a shell; the system is in /target, and exit ends the machine"
        setsid cttyhack sh </dev/ttyS0 >/dev/ttyS0 2>&1
    fi
    finish
}

stage() {
    read -r uptime _ </proc/uptime
    echo "hostler: [$uptime s] $1"
    echo "stage $1" >&3
}

read -r nonce </hostler/nonce
rm /hostler/nonce

while read -r module; do
    insmod "/modules/$module" || echo "hostler: module $module did not load"
done </modules/order

port=
tries=0
while [ -z "$port" ] && [ "$tries" -lt 100 ]; do
    for directory in /sys/class/virtio-ports/*; do
        if [ "$(cat "$directory/name" 2>/dev/null)" = org.hostler.control ]; then
            port="/dev/${directory##*/}"
        fi
    done
    [ -c "$port" ] || port=
    [ -n "$port" ] || sleep 0.1
    tries=$((tries + 1))
done
if [ -z "$port" ]; then
    echo "hostler: there is no virtio port org.hostler.control"
    finish
fi
exec 3>"$port"

# disk_device, root_device, root_uuid, file_system, mirror; results and root_archive: disks that take tar
# archives; wants_kernel; source_date: the time that all is to have happened at, if there is one; throwaway:
# whether the root file system is of no use to anyone afterwards; foreign: whether it is that of an image made
# elsewhere, which has to be found first, and how it is mounted.
. /hostler/settings

# Mounts the first file system of the disk that is a system's root.
find_root() {
    for module in $(cat /modules/more); do
        insmod "/modules/$module" || echo "hostler: module $module did not load"
    done
    for device in "$disk_device" "$disk_device"?*; do
        for file_system in ext4 xfs btrfs; do
            mount -t "$file_system" -o "$foreign" "$device" /target 2>/dev/null || continue
            if [ -e /target/etc/os-release ] || [ -L /target/etc/os-release ]; then
                echo "hostler: the root file system is $device, $file_system"
                root_device=$device
                return 0
            fi
            umount /target
        done
    done
    echo "hostler: no partition of the disk has a root file system (ext4, xfs, btrfs) with /etc/os-release"
    return 1
}

stage mount
tries=0
while [ ! -b "${root_device:-$disk_device}" ] && [ "$tries" -lt 100 ]; do
    sleep 0.1
    tries=$((tries + 1))
done
if [ -n "$foreign" ]; then
    find_root || fail find-root 1
else
    # A crash throws the disk away as a whole, so its barriers protect nothing.
    mount -t "$file_system" -o noatime,nobarrier,data=writeback "$root_device" /target || fail mount $?
fi

mount -t tmpfs -o mode=755 tmpfs /target/run || fail mount $?
mkdir -p /target/run/hostler /target/run/lock
chmod 0700 /target/run/hostler

if [ -n "$foreign" ]; then
    . /hostler/file-systems
    mount_fstab || fail mount-file-systems 1
fi

if [ -n "$root_archive" ]; then
    # The system's own file systems, without what is mounted on them for this.
    mkdir -p /target/run/hostler/root &&
        mount -o rbind /target /target/run/hostler/root &&
        umount /target/run/hostler/root/run || fail mount $?
fi

mount -t proc proc /target/proc &&
    mount -t sysfs sysfs /target/sys &&
    mount -t tmpfs -o mode=1777 tmpfs /target/tmp &&
    mount -t devtmpfs devtmpfs /target/dev &&
    mkdir -p /target/dev/pts /target/dev/shm &&
    mount -t devpts devpts /target/dev/pts &&
    mount -t tmpfs -o mode=1777 tmpfs /target/dev/shm || fail mount $?

[ ! -d /hostler/files ] || cp -R /hostler/files/. /target/run/hostler/ || fail stage-files $?

if [ -n "$mirror" ]; then
    stage network
    ip link set lo up
    tries=0
    while [ ! -e /sys/class/net/eth0 ] && [ "$tries" -lt 50 ]; do
        sleep 0.1
        tries=$((tries + 1))
    done
    ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0 || fail network $?
fi

if [ -n "$throwaway" ]; then
    mount -t cgroup2 cgroup2 /target/sys/fs/cgroup || echo "hostler: there are no control groups"
    # Big files of image builders do not belong into memory.
    umount /target/tmp
fi

# Runs a step in the root file system. A throwaway machine's gets it as the root of a mount namespace of
# its own, not by a chroot alone: in a chroot no user namespace can be made, and pivot_root fails.
enter() {
    if [ -n "$throwaway" ]; then
        unshare -m /bin/busybox sh -c 'cd /target && mount -o move . / && exec chroot . "$@"' enter "$@"
    else
        chroot /target "$@"
    fi
}

# The port is closed for the steps, so that no program of the system inherits it.
for script in /hostler/steps/*; do
    name="${script##*/}"
    name="${name#*-}"
    stage "$name"
    cp "$script" /target/run/hostler/step || fail "$name" $?
    enter /usr/bin/env -i \
        PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LC_ALL=C.UTF-8 \
        DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true \
        DEBCONF_NOWARNINGS=yes HOSTLER_DISK="$disk_device" HOSTLER_ROOT="$root_device" HOSTLER_ROOT_UUID="$root_uuid" \
        HOSTLER_MIRROR="$mirror" HOSTLER_RESULTS="$results" \
        HOSTLER_ROOT_ARCHIVE="$root_archive" HOSTLER_WANTS_KERNEL="$wants_kernel" HOSTLER_FOREIGN="$foreign" \
        ${source_date:+SOURCE_DATE_EPOCH="$source_date"} \
        /bin/sh -e /run/hostler/step </dev/null 3>&-
    status=$?
    [ "$status" -eq 0 ] || fail "$name" "$status"
done

if [ -n "$throwaway" ]; then
    # What counts is on the disk of the results.
    sync
    echo "done $nonce" >&3
    finish
fi

stage unmount
# A daemon that a package left running would keep the file system busy: everything that has its
# root in the chroot ends now.
for link in /proc/[0-9]*/root; do
    case $(readlink "$link") in
    /target | /target/*)
        process="${link#/proc/}"
        kill -9 "${process%/root}"
        ;;
    esac
done
# By the kernel's own list, whose paths have no links in them, and the last first.
awk '$2 ~ "^/target/" { path[++count] = $2 } END { while (count) print path[count--] }' /proc/mounts >/mounts
while read -r mountpoint; do
    mountpoint=$(printf '%b' "$mountpoint")
    tries=0
    until umount "$mountpoint"; do
        tries=$((tries + 1))
        [ "$tries" -lt 20 ] || fail unmount 1
        sleep 0.1
    done
done </mounts
[ -n "$foreign" ] || fstrim /target || echo "hostler: this disk takes no trim"
umount /target || fail unmount $?
if [ -n "$foreign" ]; then
    sync
    echo "done $nonce" >&3
    finish
fi
mount -t "$file_system" -o ro "$root_device" /target || fail remount $?
[ -e /target/etc/os-release ] || fail remount 1
umount /target || fail remount $?
sync

echo "done $nonce" >&3
finish
