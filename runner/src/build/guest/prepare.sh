# Makes the root file system of a throwaway machine ready for any command.

depmod -a "$(uname -r)"
mkdir -p /workspace /artifacts /etc/apt/apt.conf.d
