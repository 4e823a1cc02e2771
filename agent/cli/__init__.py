"""The slotd command."""
