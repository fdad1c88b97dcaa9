# Mounts what an image made elsewhere has beside its root file system: its packages' list may lie on a file
# system of its own, and an archive of it is to have all. Sourced by init.sh, which does this before /target/proc
# is there: a mount point may be a link to /proc/1/root, which leads out of the image.

# A program of the builder's busybox, which sees the image by the image's own links.
in_image() { chroot /target /run/hostler/busybox "$@" 3>&-; }

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

# Whether the packages' list, or what reads it, lies at this mount point or below it.
holds_packages() {
    case $1 in
    /usr/local | /usr/local/* | /usr/src | /usr/src/*) ;;
    /usr | /usr/* | /var | /var/lib | /var/lib/dpkg | /var/lib/rpm) return 0 ;;
    esac
    for folder in /usr /var /var/lib /var/lib/dpkg /var/lib/rpm; do
        case $(in_image realpath "$folder" 2>/dev/null)/ in "$1"/*) return 0 ;; esac
    done
    return 1
}

# Whether what is told of the system would lack something without this mount point.
is_needed() {
    case $1 in
    /boot) [ -n "$wants_kernel$root_archive" ] || holds_packages "$1" ;;
    *) [ -n "$root_archive" ] || holds_packages "$1" ;;
    esac
}

# Mounts one line of fstab(5), and fails where that cannot be and something would be lacking.
mount_line() {
    # Spaces and such are written as octal numbers.
    point=$(printf '%b' "$1") spec=$(printf '%b' "$2") types=$3 options=,$4,
    case $point/ in
    [!/]* | //) return 0 ;;
    */./* | */../* | *//*)
        echo "hostler: /etc/fstab has the mount point $point: write it without . and .. and doubled /"
        return 1
        ;;
    # What is there is made anew at each start.
    /dev/* | /proc/* | /run/* | /sys/*) return 0 ;;
    esac
    case $types in
    swap | proc | sysfs | tmpfs | ramfs | devtmpfs | devpts | mqueue | hugetlbfs | cgroup* | debugfs | tracefs | securityfs | efivarfs) return 0 ;;
    esac
    case $options in
    *,x-systemd.automount,*) ;;
    *,noauto,*) return 0 ;;
    esac
    place=$(in_image realpath "$point" 2>/dev/null)
    is_needed "$point" || is_needed "${place:-$point}" || return 0
    can_lack=yes
    if holds_packages "$point" || holds_packages "${place:-$point}"; then can_lack=; fi
    # What lies on no disk of the image, or is another name for what lies there: an archive of it lacks nothing.
    case $options$types, in
    *,bind,* | *,rbind,* | *,none,* | *,overlay,* | *,_netdev,* | *,nfs,* | *,nfs4,* | *,cifs,* | *,smb3,* | *,9p,* | *,virtiofs,* | *,fuse* | *,iso9660,* | *,udf,*)
        [ -z "$can_lack" ] || return 0
        ;;
    esac
    if ! device=$(device_of "$spec") || [ ! -b "$device" ]; then
        case $options in *,nofail,*) [ -z "$can_lack" ] || { echo "hostler: $spec for $point is not there, which /etc/fstab allows for"; return 0; } ;; esac
        echo "hostler: /etc/fstab names $spec for $point, which is no file system of this disk that can be mounted here (partitions with ext2, ext3, ext4, xfs, btrfs, vfat): what is told of the system would lack what lies there"
        return 1
    fi
    case $place/ in
    / | // | /dev/* | /proc/* | /run/* | /sys/*)
        echo "hostler: /etc/fstab has the mount point $point, which is no folder of this image or leads to ${place:-nowhere}"
        return 1
        ;;
    esac
    subvolume=$(echo "$options" | tr ',' '\n' | grep '^subvol' | tr '\n' ',')
    [ "$types" != auto ] || types=ext4,xfs,btrfs,vfat
    for type in $(echo "$types" | tr ',' ' '); do
        case $type in ext2 | ext3 | ext4 | xfs | btrfs | vfat) ;; *) continue ;; esac
        # There is no link in this path, and no program of the image mounts it.
        mount -i -t "$type" -o "$subvolume$foreign" "$device" "/target$place" || continue
        echo "hostler: $point is $device, $type"
        mounted="$mounted$point
"
        return 0
    done
    echo "hostler: $device, which /etc/fstab names for $point, cannot be mounted as $types"
    return 1
}

mount_fstab() {
    cp /bin/busybox /target/run/hostler/busybox || return 1
    : >/fstab
    if in_image test -e /etc/fstab || in_image test -L /etc/fstab; then
        in_image cat /etc/fstab >/fstab || { echo "hostler: /etc/fstab cannot be read"; return 1; }
    fi
    # Those above before those below.
    awk '!/^[[:space:]]*#/ && NF >= 2 {
        gsub("/+", "/", $2)
        if ($2 != "/") sub("/$", "", $2)
        print $2, $1, (NF > 2 ? $3 : "auto"), (NF > 3 ? $4 : "defaults")
    }' /fstab | sort >/fstab.sorted || return 1
    mounted=
    while read -r point spec types options; do
        mount_line "$point" "$spec" "$types" "$options" </dev/null || return 1
    done </fstab.sorted
    for unit in usr var var-lib var-lib-dpkg var-lib-rpm; do
        point=/$(echo "$unit" | tr - /)
        ! echo "$mounted" | grep -qxF "$point" || continue
        for folder in /etc /usr/local/lib /usr/lib /lib; do
            file=$folder/systemd/system/$unit.mount
            in_image test -e "$file" || in_image test -L "$file" || continue
            # Masked: by a link to nothing, or by an empty file.
            case $(in_image readlink "$file") in *dev/null) break ;; esac
            in_image test -s "$file" || in_image test -L "$file" || break
            echo "hostler: the unit $file mounts $point, which is only done for /etc/fstab here: what is told of the system would lack what lies there"
            return 1
        done
    done
}
