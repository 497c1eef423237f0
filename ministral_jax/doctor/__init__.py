"""What is wrong with a checkpoint that somebody brings, said before any device works on it."""
