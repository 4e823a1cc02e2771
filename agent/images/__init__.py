"""How an image gets onto the host: references, registries, the store, the puller, unpacking."""
