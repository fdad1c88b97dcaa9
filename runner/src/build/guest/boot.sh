# Makes the image boot: GRUB for BIOS on the disk, an initramfs for each kernel, and the menu.

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
grub-install --target=i386-pc --no-floppy "$HOSTLER_DISK" &
installing=$!

if command -v update-initramfs >/dev/null; then
    # Under emulation the default initramfs takes three minutes: each of some hundred drivers costs
    # several processes, and the best compression a minute. For this first one, a cloud kernel gets
    # the drivers of the disks that virtual machines have. The image's own configuration stays as
    # the packages made it, and holds for every initramfs that comes later.
    settings=/etc/initramfs-tools/conf.d/hostler-build
    drivers=/usr/share/initramfs-tools/modules.d/hostler-build
    mkdir -p "${settings%/*}" "${drivers%/*}"
    printf 'COMPRESS=gzip\nCOMPRESSLEVEL=1\n' >"$settings"
    case "$(ls /lib/modules)" in
    *[!a-z0-9.-]* | '') ;;
    *-cloud-*)
        echo MODULES=list >>"$settings"
        printf '%s\n' virtio_pci virtio_mmio virtio_blk virtio_scsi virtio_pmem nvme sd_mod sr_mod \
            ata_piix ata_generic ahci xen-blkfront hv_vmbus hv_storvsc vmw_pvscsi mptspi BusLogic \
            ext4 >"$drivers"
        ;;
    esac
    status=0
    update-initramfs -c -k all || status=$?
    rm -f "$settings" "$drivers"
    [ "$status" -eq 0 ] || exit "$status"
fi

wait "$installing"

# The menu names the root file system by its UUID where such a link is there, and no udev makes one
# in here.
mkdir -p /dev/disk/by-uuid
ln -sf "$HOSTLER_ROOT" "/dev/disk/by-uuid/$HOSTLER_ROOT_UUID"
update-grub
grep -q "root=UUID=$HOSTLER_ROOT_UUID" /boot/grub/grub.cfg || {
    echo "the boot menu does not name the root file system by its UUID"
    exit 1
}
