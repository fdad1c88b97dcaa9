# Runs the preinst scripts of packages that the host unpacked without running any code of theirs.
# Read from /run/hostler/preinst: one package name as dpkg's info files have it, on each line.

while read -r package; do
    script="/var/lib/dpkg/info/$package.preinst"
    [ -e "$script" ] || continue
    DPKG_MAINTSCRIPT_PACKAGE="${package%%:*}" DPKG_MAINTSCRIPT_PACKAGE_REFCOUNT=1 \
        DPKG_MAINTSCRIPT_ARCH="$(dpkg --print-architecture)" DPKG_MAINTSCRIPT_NAME=preinst \
        DPKG_ADMINDIR=/var/lib/dpkg DPKG_ROOT= "$script" install
done </run/hostler/preinst
