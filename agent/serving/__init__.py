"""Answering clients."""
