"""One table of commands, and the local socket that takes them."""
