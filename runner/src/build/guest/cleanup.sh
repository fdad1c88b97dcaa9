# Removes what the build left behind and what must differ between machines.

rm -f /usr/sbin/policy-rc.d
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb
rm -f /var/cache/debconf/*-old /var/lib/dpkg/*-old /var/cache/ldconfig/aux-cache
rm -f /var/lib/systemd/random-seed /var/lib/dbus/machine-id /etc/.pwd.lock
find /var/log -type f -exec rm -f {} +
find /var/tmp -mindepth 1 -delete
# Empty, not absent: systemd then makes one at boot, and a read-only root can still mount over it.
: >/etc/machine-id
