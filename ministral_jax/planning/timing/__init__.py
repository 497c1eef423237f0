"""How long a stage takes: arithmetic, memory, loops and links."""
