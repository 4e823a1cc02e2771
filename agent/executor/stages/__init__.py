"""The stages that a worker can run."""
