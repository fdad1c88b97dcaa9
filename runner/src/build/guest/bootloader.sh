# Puts GRUB for BIOS onto the disk, with its menu and the kernel on screen and serial line both.

command -v grub-install >/dev/null || {
    echo "there is no grub-install in the image: add grub-pc to the recipe's packages"
    exit 1
}
mkdir -p /etc/default/grub.d
cat >/etc/default/grub.d/50-hostler.cfg <<'CONFIGURATION'
GRUB_TIMEOUT=1
GRUB_CMDLINE_LINUX_DEFAULT=""
GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200"
GRUB_TERMINAL="console serial"
GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"
GRUB_DISABLE_OS_PROBER=true
CONFIGURATION
grub-install --target=i386-pc --no-floppy "$HOSTLER_DISK"
update-grub
grep -q "root=UUID=" /boot/grub/grub.cfg || {
    echo "the boot menu does not name the root file system by its UUID"
    exit 1
}
