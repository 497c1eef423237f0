"""Whether a recipe fits a machine, how long it takes there, and what must change: arithmetic that needs no device."""
