"""The slot helper: what a driver cannot do without root, as a few fixed verbs on the devices that root has configured.

A service of its own (systemd/slotd-slot-helper.service): started by a connection to its socket, without network and
capabilities, with the standard library only. It serves the user slotd and nobody else, root included. Drivers ask by
`drivers.helper.client`.

One JSON line each way, at most 4 KiB:
`{"id", "verb", "device", "arguments"}` -> `{"id", "ok": true, "result"}` or `{"id", "ok": false, "error"}`,
where an error is `{"code", "message", "hint"}`. A file that a verb needs comes along as a descriptor (SCM_RIGHTS).
"""

from __future__ import annotations

from pathlib import Path

SOCKET = Path("/run/slotd-slot-helper.sock")
MAX_LINE = 4096
