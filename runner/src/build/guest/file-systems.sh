# Mounts what a system has beside its root file system, as far as it is asked for: its packages' list may lie on
# a file system of its own, and an archive of it is to have all. Sourced by init.sh, for images made elsewhere.

# The number that the partition table has for a partition of the disk, as fstab(5) writes it.
partition_uuid() {
    number=${1#"$disk_device"}
    bytes() { dd if="$disk_device" bs=1 skip="$1" count="$2" 2>/dev/null | hexdump -v -e '1/1 "%02x "'; }
    if [ "$(dd if="$disk_device" bs=1 skip=512 count=8 2>/dev/null)" = "EFI PART" ]; then
        # The entries begin at the third sector, with 128 bytes each.
        # shellcheck disable=SC2046 # one word for each byte
        set -- $(bytes $((1024 + 128 * (number - 1) + 16)) 16)
        echo "$4$3$2$1-$6$5-$8$7-$9${10}-${11}${12}${13}${14}${15}${16}"
    else
        # shellcheck disable=SC2046
        set -- $(bytes 440 4)
        printf '%s%s%s%s-%02x\n' "$4" "$3" "$2" "$1" "$number"
    fi
}

# The device that a first field of fstab(5) means.
device_of() {
    spec=$(echo "$1" | tr -d '"')
    case $spec in
    /dev/disk/by-uuid/*) spec=UUID=${spec##*/} ;;
    /dev/disk/by-label/*) spec=LABEL=${spec##*/} ;;
    /dev/disk/by-partuuid/*) spec=PARTUUID=${spec##*/} ;;
    esac
    case $spec in
    UUID=* | LABEL=*) findfs "$spec" ;;
    PARTUUID=*)
        wanted=$(echo "${spec#*=}" | tr '[:upper:]' '[:lower:]')
        for device in "$disk_device"?*; do
            [ "$(partition_uuid "$device")" != "$wanted" ] || { echo "$device"; return 0; }
        done
        return 1
        ;;
    # The first disk, whatever it was called where the system was installed.
    /dev/[hsv]da[0-9]* | /dev/xvda[0-9]*) echo "$disk_device${spec#/dev/*da}" ;;
    /dev/nvme0n1p[0-9]* | /dev/mmcblk0p[0-9]*) echo "$disk_device${spec##*p}" ;;
    *) return 1 ;;
    esac
}

# Whether what is told of the system would lack something without this mount point.
is_needed() {
    case $1 in
    /usr | /usr/* | /var | /var/lib | /var/lib/dpkg | /var/lib/rpm) return 0 ;;
    /boot) [ -n "$wants_kernel$root_archive" ] ;;
    *) [ -n "$root_archive" ] ;;
    esac
}

# What was mounted, the last first.
mounted=

mount_more() {
    cp /bin/busybox /target/run/hostler/busybox || return 1
    [ -r /target/etc/fstab ] || return 0
    # Those above before those below.
    sed -e 's/[[:space:]]*#.*//' /target/etc/fstab | awk 'NF >= 3 { print $2, $1, $3, $4 }' | sort >/fstab
    while read -r point spec file_system options; do
        case $point in / | none | swap | [!/]*) continue ;; esac
        case $file_system in
        swap | proc | sysfs | tmpfs | ramfs | devtmpfs | devpts | mqueue | hugetlbfs | cgroup* | debugfs | securityfs | efivarfs | overlay | nfs* | cifs | 9p | fuse* | iso9660 | udf) continue ;;
        esac
        case ,$options, in *,noauto,*) continue ;; esac
        is_needed "$point" || continue
        point=$(printf '%b' "$point")
        case $file_system in
        ext2 | ext3 | ext4 | xfs | btrfs | vfat | auto) ;;
        # Another name for what is there already, which an archive has anyway.
        none | bind) case $point in /usr | /usr/* | /var | /var/lib*) ;; *) continue ;; esac ;;
        esac
        if ! device=$(device_of "$spec") || [ ! -b "$device" ]; then
            echo "hostler: /etc/fstab names $spec for $point, which is no file system of this disk that can be mounted here (partitions with ext2, ext3, ext4, xfs, btrfs, vfat): what is told of the system would lack what lies there"
            return 1
        fi
        subvolume=$(echo "$options" | tr ',' '\n' | grep '^subvol' | tr '\n' ',')
        # By the system's own links, and never out of it. -t is left out for "auto".
        set -- -o "$subvolume$foreign" "$device" "$point"
        [ "$file_system" = auto ] || set -- -t "$file_system" "$@"
        if ! chroot /target /run/hostler/busybox mount "$@"; then
            echo "hostler: $device, which /etc/fstab names for $point, cannot be mounted as $file_system"
            return 1
        fi
        echo "hostler: $point is $device, $file_system"
        mounted="$point
$mounted"
    done </fstab
    for unit in usr var var-lib var-lib-dpkg var-lib-rpm; do
        point=/$(echo "$unit" | tr - /)
        if [ -e "/target/etc/systemd/system/$unit.mount" ] && ! echo "$mounted" | grep -qx "$point"; then
            echo "hostler: the unit $unit.mount mounts $point, which is only done for /etc/fstab here: what is told of the system would lack what lies there"
            return 1
        fi
    done
}

# The same once more, where an archive is made of the root file system.
mount_below() {
    echo "$mounted" | sort | while read -r point; do
        [ -z "$point" ] || chroot /target /run/hostler/busybox mount -o bind "$point" "/run/hostler/root$point" || exit 1
    done
}

unmount_more() {
    echo "$mounted" | while read -r point; do
        [ -n "$point" ] || continue
        [ -z "$root_archive" ] || chroot /target /run/hostler/busybox umount "/run/hostler/root$point" || exit 1
        chroot /target /run/hostler/busybox umount "$point" || exit 1
    done
}
