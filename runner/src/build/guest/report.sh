# Tells what is in an image, as a tar archive on a disk of its own: its name, its packages, and what else
# was asked for. Nothing is written to the image itself: it may be mounted read-only.

mkdir -p /run/hostler/report
cd /run/hostler/report || exit
: >dpkg-status
: >rpm-packages
cat /etc/os-release >os-release
if [ -s /var/lib/dpkg/status ]; then
    cat /var/lib/dpkg/status >dpkg-status
elif command -v rpm >/dev/null; then
    rpm --query --all --queryformat \
        '%{NAME}\t%{EPOCH}\t%{VERSION}\t%{RELEASE}\t%{ARCH}\t%{LICENSE}\n' >rpm-packages
fi
if [ ! -s dpkg-status ] && [ ! -s rpm-packages ] && { command -v dpkg || command -v rpm || [ -d /var/lib/dpkg ]; } >/dev/null; then
    echo "there is a package manager, and no list of its packages: does that lie on a file system that /etc/fstab does not name?"
    exit 1
fi
set -- os-release dpkg-status rpm-packages
if [ -n "$HOSTLER_WANTS_KERNEL" ]; then
    kernel=$(find /boot -maxdepth 1 -name 'vmlinuz-*' ! -name '*rescue*' | sort -V | tail -n 1)
    [ -n "$kernel" ] || { echo "there is no kernel /boot/vmlinuz-*: leave \"kernel\" out of output.formats"; exit 1; }
    release=${kernel#/boot/vmlinuz-}
    for initrd in "/boot/initrd.img-$release" "/boot/initramfs-$release.img" "/boot/initrd-$release" ''; do
        [ -n "$initrd" ] || { echo "there is no initramfs for kernel $release in /boot"; exit 1; }
        [ ! -e "$initrd" ] || break
    done
    cp "$kernel" kernel
    cp "$initrd" initrd
    set -- "$@" kernel initrd
fi
tar --create --file="$HOSTLER_RESULTS" "$@"
if [ -n "$HOSTLER_ROOT_ARCHIVE" ]; then
    # An image made elsewhere has what /etc/fstab names mounted there, and nothing else.
    one_file_system=--one-file-system
    [ -z "$HOSTLER_FOREIGN" ] || one_file_system=
    # shellcheck disable=SC2086 # a word, or none
    tar --create --file="$HOSTLER_ROOT_ARCHIVE" --directory=/run/hostler/root --sort=name \
        $one_file_system \
        ${SOURCE_DATE_EPOCH:+--mtime=@$SOURCE_DATE_EPOCH --clamp-mtime} \
        --numeric-owner --xattrs --xattrs-include='*' --format=posix \
        --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime .
fi
