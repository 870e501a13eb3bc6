#!/bin/sh
# Makes the guest's two initramfs archives.
#
#   initramfs.sh BUSYBOX.deb KERNEL OUT
#
# KERNEL is what kernel.sh made; OUT receives
#
#   umbra-linux      the guest's first program (guest/), which also checks disk images outside of a guest
#   initramfs        that program alone: what a test needs
#   initramfs-tools  the same with Debian's static busybox, for umbra.jobs=run, shell, and disks to format
#
# Neither is compressed: unpacking is work for the guest's kernel, and copying is the quickest.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
package=$1 kernel=$2 out=$3

mkdir -p "$out"
# musl: a tenth of glibc's size, and its functions use no vector registers that a kernel may not look after. The headers
# of the kernel's interface come from Debian's libc6-dev.
musl-gcc -std=gnu11 -Os -Wall -Wextra -static -idirafter /usr/include -idirafter "/usr/include/$(uname -m)-linux-gnu" \
	-o "$out/umbra-linux" "$here"/guest/*.c
strip --strip-all "$out/umbra-linux"
dpkg-deb --fsys-tarfile "$package" | tar --extract --to-stdout ./bin/busybox >"$out/busybox"

list() {
	cat <<-END
		dir /dev 0755 0 0
		nod /dev/console 0600 0 0 c 5 1
		dir /proc 0755 0 0
		dir /sys 0755 0 0
		file /init $out/umbra-linux 0755 0 0
	END
}

# Busybox's shell finds its other commands by itself; scripts begin with /bin/sh.
tools() {
	cat <<-END
		dir /bin 0755 0 0
		file /bin/busybox $out/busybox 0755 0 0
		slink /bin/sh busybox 0777 0 0
	END
}

list >"$out/list"
"$kernel/gen_init_cpio" -t 0 "$out/list" >"$out/initramfs"
tools >>"$out/list"
"$kernel/gen_init_cpio" -t 0 "$out/list" >"$out/initramfs-tools"
rm "$out/list" "$out/busybox"
