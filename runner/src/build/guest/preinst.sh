# Runs the preinst scripts of packages that the host unpacked without running any code of theirs.
# Read from /run/hostler/preinst: package, architecture, version and script on each line.

export PATH="/run/hostler/bin:$PATH"

while read -r package architecture version script; do
    DPKG_MAINTSCRIPT_PACKAGE="$package" DPKG_MAINTSCRIPT_PACKAGE_REFCOUNT=1 \
        DPKG_MAINTSCRIPT_ARCH="$architecture" DPKG_MAINTSCRIPT_NAME=preinst \
        DPKG_ADMINDIR=/var/lib/dpkg DPKG_ROOT= "$script" install </dev/null || {
        echo "the preinst script of $package $version failed"
        exit 1
    }
done </run/hostler/preinst
