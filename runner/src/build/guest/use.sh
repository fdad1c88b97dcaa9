# What each command of a throwaway machine runs after.

cd /workspace
export HOSTLER_ARTIFACTS=/artifacts
