# Gives a throwaway machine what its commands work with: the workspace, and apt's sources.

hostname --file /etc/hostname
# For whatever way a command calls apt in; nothing of this leaves the machine.
cp /run/hostler/apt.conf /etc/apt/apt.conf.d/99hostler
cp /run/hostler/sources.list /etc/apt/sources.list
if [ -e /run/hostler/has-workspace ]; then
    tar --extract --file=/dev/vdb --directory=/workspace
fi
