"""The commands, each in a file of its own: what it may be told, and what it calls. Importing them does not load JAX."""
