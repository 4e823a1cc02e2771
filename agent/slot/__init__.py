"""The slot: who answers, and how a model gets in."""
