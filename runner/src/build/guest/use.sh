# What each command of a throwaway machine runs after.

cd /workspace || exit
export HOSTLER_ARTIFACTS=/artifacts
