#!/bin/sh
# The version that `current` names, looked up once: a slotd that runs never mixes two versions.
tree=$(readlink -e /opt/slotd/current) || { echo "slotd: /opt/slotd/current names no version" >&2; exit 69; }
exec "$tree/bin/python" -I -m agent "$@"
