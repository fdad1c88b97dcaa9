# Installs the dormant unit with which the finished image proves that it boots. The device that
# wakes it exists only in a machine of Hostler's.

install -D -m 0755 /run/hostler/verify-boot /usr/local/lib/hostler/verify-boot
install -D -m 0644 /run/hostler/hostler-verify.service \
    /etc/systemd/system/hostler-verify.service
install -D -m 0644 /run/hostler/hostler-verify.rules \
    /etc/udev/rules.d/90-hostler-verify.rules
