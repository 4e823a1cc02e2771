"""What a model is: its specification, its signature, its golden cases. Known to all, knows nobody."""
