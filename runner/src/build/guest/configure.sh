# Configures every unpacked package.

# The host's own services must not start in a chroot.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 0755 /usr/sbin/policy-rc.d

# The initramfs is made once, by a step of its own: packages would have it made twice.
export INITRD=No
export PATH="/run/hostler/bin:$PATH"

# What maintainer scripts take for granted of an essential system, before the dependencies of these
# few can be configured themselves.
dpkg --force-unsafe-io --force-depends --configure base-passwd mawk base-files
dpkg --force-unsafe-io --configure -a
