# What each of the recipe's commands runs after. All that apt needs to use the builder's mirror
# lies in /run, so that nothing of it stays in the image.

if [ -n "$HOSTLER_MIRROR" ]; then
    export APT_CONFIG=/run/hostler/apt.conf
    if [ ! -e /run/hostler/apt-updated ]; then
        apt-get update
        : >/run/hostler/apt-updated
    fi
fi
export INITRD=No
