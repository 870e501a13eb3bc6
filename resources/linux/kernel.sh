#!/bin/sh
# Turns Debian's linux-source package into the guest's kernel.
#
#   kernel.sh PACKAGE.deb WORK OUT
#
# WORK is an empty directory for about 1.6 GB of sources and objects; OUT receives
#
#   vmlinux        the kernel as an ELF file, for PVH and the 64-bit boot protocol
#   bzImage        the same with the header and the decompressor of the boot protocol
#   config         what it was configured with
#   gen_init_cpio  the kernel's tool that makes an initramfs
#
# `cargo xtask linux` runs this once for each change of anything below this folder that it reads, or of the package.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
package=$1 work=$2 out=$3

# Two builds of the same sources give the same bytes, whoever builds them and where.
export KBUILD_BUILD_TIMESTAMP='1970-01-01' KBUILD_BUILD_USER=umbra KBUILD_BUILD_HOST=umbra KBUILD_BUILD_VERSION=1
export LC_ALL=C
unset MAKEFLAGS MFLAGS MAKELEVEL

echo "kernel.sh: unpacking $(basename "$package")"
dpkg-deb --fsys-tarfile "$package" | tar --extract --to-stdout --wildcards './usr/src/linux-source-*.tar.xz' |
	tar --extract --xz --directory "$work" --strip-components 1
cd "$work"
for change in "$here"/patches/*.patch; do
	patch --strip 1 --silent --input "$change"
done

echo "kernel.sh: configuring"
cat "$here"/config/*.config >"$work/umbra.config"
make --silent KCONFIG_ALLCONFIG="$work/umbra.config" allnoconfig
# Kconfig drops a line whose dependencies are off without a word.
missing=$(grep '^CONFIG_' umbra.config | sort | grep --invert-match --line-regexp --fixed-strings --file .config || true)
if [ -n "$missing" ]; then
	echo "kernel.sh: the kernel's configuration lacks:" $missing >&2
	exit 1
fi

echo "kernel.sh: compiling on $(nproc) processors; this takes minutes"
nice make --silent --jobs "${JOBS:-$(nproc)}" vmlinux bzImage

mkdir -p "$out"
strip --strip-all vmlinux -o "$out/vmlinux"
cp arch/x86/boot/bzImage usr/gen_init_cpio "$out/"
cp .config "$out/config"
