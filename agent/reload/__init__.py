"""The configuration while slotd runs: read, watched, compared, put into force, kept."""
