"""The tables of journal.db, and how an older database becomes one of today.

A migration is never changed once released; a new one is added, and may only add: an older slotd puts a newer database
aside, so what must survive a downgrade is in boot.json, not here.
"""

from __future__ import annotations

APPLICATION = 0x736C6F74
"""`PRAGMA application_id`: "slot"."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "CREATE TABLE state (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        # `asked` is what begin() was given, `document` what end() was given, both JSON.
        """CREATE TABLE deployments (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            asked TEXT NOT NULL,
            digest TEXT,
            created REAL NOT NULL,
            ended REAL,
            ended_steady REAL,
            outcome TEXT,
            error TEXT,
            document TEXT
        )""",
        "CREATE INDEX unfinished ON deployments (number) WHERE outcome IS NULL",
        # `steady` (CLOCK_BOOTTIME) can be compared within one boot_id only.
        """CREATE TABLE phases (
            deployment INTEGER NOT NULL,
            step INTEGER NOT NULL,
            phase TEXT NOT NULL,
            wall REAL NOT NULL,
            steady REAL NOT NULL,
            boot_id TEXT NOT NULL,
            PRIMARY KEY (deployment, step)
        ) WITHOUT ROWID""",
        "CREATE TABLE attempts (key TEXT PRIMARY KEY, count INTEGER NOT NULL, counted REAL NOT NULL) WITHOUT ROWID",
        """CREATE TABLE commands (
            id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            body TEXT NOT NULL,
            actor TEXT NOT NULL,
            received REAL NOT NULL,
            state TEXT NOT NULL,
            answer TEXT,
            size INTEGER NOT NULL
        )""",
        "CREATE INDEX commands_by_age ON commands (received, size)",
        "CREATE INDEX commands_cut_off ON commands (state) WHERE state = 'running'",
        # `first` is set for a gap: it covers first..seq.
        """CREATE TABLE outbox (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            first INTEGER,
            document TEXT NOT NULL,
            created REAL NOT NULL,
            size INTEGER NOT NULL
        )""",
        "CREATE INDEX outbox_by_age ON outbox (created, size)",
    ),
    # The error that a deployment was called off with, before it has come to its end.
    ("ALTER TABLE deployments ADD COLUMN called_off TEXT",),
)

TABLES = frozenset({"meta", "state", "deployments", "phases", "attempts", "commands", "outbox"})
"""What a journal of any schema has."""
