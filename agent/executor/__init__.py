"""Child processes that hold a model, and the channel to them."""
