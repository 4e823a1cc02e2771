#!/bin/sh
# Puts slotd in place, or takes it away, and says what it did: make install, make uninstall.
#   install.sh program|system|uninstall
# From the environment: PREFIX (/usr/local), DESTDIR (nothing; with it, users and services are left alone), PYTHON.
set -eu
umask 022
prefix=${PREFIX:-/usr/local} dest=${DESTDIR:-} python=${PYTHON:-python3}
sources=$(cd "$(dirname "$0")/.." && pwd)
tree=$prefix/lib/slotd units=$prefix/lib/systemd/system config=/etc/slotd/config.yaml

say() { echo "slotd: $*"; }

# place SOURCE TARGET [MODE]: a file, with the paths that its content names changed to where things are put.
place() {
  mkdir -p "$dest$(dirname "$2")"
  sed -e "s|/opt/slotd/current|$tree|g" -e "s|/usr/bin/slotd|$prefix/bin/slotd|g" \
    -e "s|/usr/share/doc/slotd|$prefix/share/doc/slotd|g" "$1" > "$dest$2.new"
  chmod "${3:-644}" "$dest$2.new"
  mv "$dest$2.new" "$dest$2"
  say "put $dest$2"
}

system_files() {
  echo "systemd/slotd.service $units/slotd.service
systemd/slotd-slot-helper.service $units/slotd-slot-helper.service
systemd/slotd-slot-helper.socket $units/slotd-slot-helper.socket
systemd/slotd.sysusers $prefix/lib/sysusers.d/slotd.conf
systemd/slotd.tmpfiles $prefix/lib/tmpfiles.d/slotd.conf
systemd/slotd.modules-load $prefix/lib/modules-load.d/slotd.conf
systemd/70-slotd.rules $prefix/lib/udev/rules.d/70-slotd.rules
packaging/slot-helper.example.toml $prefix/share/doc/slotd/slot-helper.toml
README.md $prefix/share/doc/slotd/README.md
LICENSE $prefix/share/doc/slotd/LICENSE"
}

live() { [ -z "$dest" ] && [ -d /run/systemd/system ]; }

program() {
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { say "needs Python 3.11" >&2; exit 1; }
  say "making $dest$tree (a few minutes)"
  rm -rf "$dest$tree.new"
  "$python" -m venv "$dest$tree.new"
  "$dest$tree.new/bin/python" -m pip install -q --disable-pip-version-check --root-user-action=ignore \
    "$sources" 'amqtt>=0.11.3'
  rm -rf "$dest$tree"
  mv "$dest$tree.new" "$dest$tree"
  find "$dest$tree/bin" -type f ! -name 'python*' -delete  # scripts name the place where they were made
  say "put $dest$tree"
  mkdir -p "$dest$prefix/bin"
  printf '#!/bin/sh\nexec %s/bin/python -I -m agent "$@"\n' "$tree" > "$dest$prefix/bin/slotd"
  chmod 755 "$dest$prefix/bin/slotd"
  say "put $dest$prefix/bin/slotd"
}

system() {
  system_files | while read -r source target; do place "$sources/$source" "$target"; done
  if [ -e "$dest$config" ]; then
    say "left $dest$config as it is"
  else
    mkdir -p "$dest$(dirname "$config")"
    # Two hosts with the example's name would fight over it; without a name a host has its own.
    sed 's/^device: /# device: /' "$sources/config.example.yaml" > "$dest$config"
    chmod 644 "$dest$config"
    say "put $dest$config: a simulated slot; change it, see what slotd check says"
  fi
  if [ -z "$dest" ]; then
    systemd-sysusers "$prefix/lib/sysusers.d/slotd.conf"
    say "made the user slotd and the groups slotd-clients and slotd-admin"
    systemd-tmpfiles --create "$prefix/lib/tmpfiles.d/slotd.conf"
  fi
  if live; then
    systemctl daemon-reload
    udevadm control --reload 2>/dev/null || true  # no udev here
    say "now: systemctl enable --now slotd-slot-helper.socket slotd"
  fi
}

uninstall() {
  if live; then
    systemctl disable --now slotd.service slotd-slot-helper.socket slotd-slot-helper.service 2>/dev/null || true
    say "stopped and disabled slotd"
  fi
  system_files | while read -r _ target; do
    if [ -e "$dest$target" ]; then rm "$dest$target" && say "removed $dest$target"; fi
  done
  for target in "$prefix/bin/slotd" "$tree"; do
    if [ -e "$dest$target" ]; then rm -rf "$dest$target" && say "removed $dest$target"; fi
  done
  rmdir "$dest$prefix/share/doc/slotd" 2>/dev/null || true  # it holds something of yours
  if live; then systemctl daemon-reload; fi
  say "left: $dest/etc/slotd, $dest/var/lib/slotd (models and state), the user slotd"
}

case ${1:-} in
  program) program ;;
  system) system ;;
  uninstall) uninstall ;;
  *) echo "usage: install.sh program|system|uninstall" >&2; exit 64 ;;
esac
