"""What XLA's compiler says of a stage's programs."""
