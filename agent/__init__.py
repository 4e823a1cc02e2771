"""slotd: keeps one accelerator slot serving, and never lets a client notice a swap."""

__version__ = "0.1.0"
