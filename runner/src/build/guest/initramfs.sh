# Makes the initramfs of each kernel once, now that all packages are configured.

command -v update-initramfs >/dev/null || exit 0
update-initramfs -c -k all
