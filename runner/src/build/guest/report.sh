# Tells what is in an image, as a tar archive on a disk of its own: its name, its packages, and what else
# was asked for. Nothing is written to the image itself: it may be mounted read-only.

mkdir -p /run/hostler/report
cd /run/hostler/report || exit
: >dpkg-status
: >rpm-packages
cat /etc/os-release >os-release
database=
for folder in /var/lib/dpkg /var/lib/rpm /usr/lib/sysimage/rpm /usr/share/rpm; do
    if [ -e "$folder" ] || [ -L "$folder" ]; then database="$database $folder"; fi
done
if [ -s /var/lib/dpkg/status ]; then
    cat /var/lib/dpkg/status >dpkg-status
elif [ -n "$database" ] && command -v rpm >/dev/null; then
    # A licence may have tabs and lines of its own: fields and packages end with what ASCII has for that.
    unit=$(printf '\037')
    rpm --query --all --queryformat \
        "%{NAME}$unit%{EPOCH}$unit%{VERSION}$unit%{RELEASE}$unit%{ARCH}$unit%{LICENSE}$(printf '\036')" >rpm-packages
fi
if [ -n "$database" ] && [ ! -s dpkg-status ] && [ ! -s rpm-packages ]; then
    echo "there is$database, and no list of packages in it: does that lie on a file system that /etc/fstab does not name, or is there no program rpm?"
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
