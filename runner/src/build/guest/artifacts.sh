# Hands over the files that the commands had to leave, as a tar archive on a disk of their own.

cd /artifacts || exit
while read -r name; do
    if [ ! -f "$name" ] || [ -L "$name" ]; then
        echo "the commands left no file /artifacts/$name; in /artifacts there is: $(ls -A | tr '\n' ' ')"
        exit 1
    fi
done </run/hostler/artifacts
tar --create --sparse --format=gnu --file="$HOSTLER_RESULTS" --files-from=/run/hostler/artifacts
