"""How a model becomes an image. Never imported by the daemon."""
