#!/bin/sh
# Runs as PID 1 of fresh namespaces (see machine.py): lays out the machine and becomes systemd.
#   boot.sh FOLDER SIZE [SOURCE TARGET]...
set -eu
folder=$1 size=$2
shift 2
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
live=$folder/live root=$folder/live/root

groups=$(awk '$(NF-2) == "cgroup" || $(NF-2) == "cgroup2" { print $5, $(NF-2), $NF }' /proc/self/mountinfo)

mkdir "$live"
mount -t tmpfs -o "size=$size,mode=755" tmpfs "$live"
mkdir "$live/upper" "$live/work" "$root"
mount -t overlay -o "lowerdir=/,upperdir=$live/upper,workdir=$live/work" overlay "$root"

# Only what a test starts is started, and nothing that would reach the kernel that the host shares.
rm -rf "$root"/etc/systemd/system "$root"/etc/systemd/network "$root"/usr/lib/systemd/system/*.wants
rm -rf "$root"/var/log/journal "$root"/etc/fstab
units=$root/etc/systemd/system
mkdir -p "$units/sysinit.target.wants" "$units/sockets.target.wants" "$root/etc/systemd/journald.conf.d"
for unit in systemd-sysctl.service systemd-modules-load.service systemd-udevd.service systemd-udev-trigger.service \
  systemd-networkd.service systemd-timesyncd.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount \
  systemd-remount-fs.service systemd-random-seed.service systemd-hwdb-update.service tmp.mount dev-hugepages.mount \
  dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount \
  sys-fs-fuse-connections.mount getty.target console-getty.service systemd-oomd.service \
  systemd-journald-audit.socket; do
  ln -s /dev/null "$units/$unit"
done
ln -s /lib/systemd/system/multi-user.target "$units/default.target"
ln -s /lib/systemd/system/systemd-journald.service "$units/sysinit.target.wants/"
ln -s /lib/systemd/system/systemd-journald.socket "$units/sockets.target.wants/"
ln -s /lib/systemd/system/systemd-journald-dev-log.socket "$units/sockets.target.wants/"
printf '[Journal]\nStorage=volatile\nRateLimitBurst=0\nReadKMsg=no\nAudit=no\nForwardToWall=no\n' \
  > "$root/etc/systemd/journald.conf.d/machine.conf"
tr -d - < /proc/sys/kernel/random/uuid > "$root/etc/machine-id"
echo slotd-vm > "$root/etc/hostname"
hostname slotd-vm

mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro,nosuid,nodev,noexec "$root/proc/sys"
[ ! -e "$root/proc/sysrq-trigger" ] || mount --bind /dev/null "$root/proc/sysrq-trigger"
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"

mount -t tmpfs -o mode=755,nosuid tmpfs "$root/dev"
while read -r name major minor; do
  mknod -m 666 "$root/dev/$name" c "$major" "$minor"
done <<END
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
END
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
ln -s /proc/self/fd/0 "$root/dev/stdin"
ln -s /proc/self/fd/1 "$root/dev/stdout"
ln -s /proc/self/fd/2 "$root/dev/stderr"
touch "$root/dev/console"
mount --bind "$folder/console" "$root/dev/console"
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$root/run"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/tmp"

# The same hierarchies as the host, each showing this machine's own group as its root.
case $groups in
  "/sys/fs/cgroup cgroup2"*) mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup" ;;
  *)
    mount -t tmpfs -o mode=755,nosuid,nodev,noexec tmpfs "$root/sys/fs/cgroup"
    echo "$groups" | while read -r place type options; do
      mkdir -p "$root$place"
      if [ "$type" = cgroup2 ]; then
        mount -t cgroup2 cgroup2 "$root$place"
      else
        mount -t cgroup -o "$(echo "$options" | tr , '\n' | grep -v '^r[wo]$' | paste -sd,)" cgroup "$root$place"
      fi
    done
    ;;
esac

while [ $# -gt 0 ]; do
  mkdir -p "$root$2"
  mount --bind "$1" "$root$2"
  mount -o remount,bind,ro "$root$2"
  shift 2
done

cd "$root"
mkdir -p mnt
pivot_root . mnt
umount -l mnt
exec env -i container=slotd-vm PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
  /lib/systemd/systemd --system --log-target=console --show-status=no
