"""What would stop or slow a recipe on a machine."""
