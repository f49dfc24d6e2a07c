set -eu

# Writes and reads files of so many MiB in a directory from so many processors at once, at depth 32, in blocks of 4 KiB to
# 1 MiB, and verifies all that was written.
write_and_verify() {
	fio --name=load --directory="$1" --size="$2M" --numjobs="$3" --cpus_allowed="0-$(($3 - 1))" --cpus_allowed_policy=split \
		--rw=randrw --bsrange=4k-1M --ioengine=libaio --direct=1 --iodepth=32 --verify=crc32c --verify_fatal=1 \
		--group_reporting --output-format=terse >/run/fio 2>&1 || {
		cat /run/fio
		echo "failed: fio in $1"
		return 1
	}
}

# Says "beat" after each answer of the disk to a write past the cache, until there is a file /run/stop. $1: a file on the disk.
prober() {
	dd if=/dev/zero of="$1" bs=4k count=16 conv=fsync 2>/run/dd
	at=0
	while [ ! -e /run/stop ]; do
		dd if=/dev/zero of="$1" bs=4k count=1 seek=$((at % 16)) oflag=direct conv=notrunc 2>/run/dd || {
			cat /run/dd
			echo "failed: a write"
			return 1
		}
		echo beat
		at=$((at + 1))
		sleep 0.05
	done
}

# As write_and_verify, again and again until there is a file /run/stop.
write_and_verify_until_stopped() {
	passes=0
	while [ ! -e /run/stop ]; do
		write_and_verify "$@"
		passes=$((passes + 1))
	done
	echo "passes $passes"
}

# Waits until a command succeeds.
until_true() {
	until "$@"; do sleep 0.1; done
}
