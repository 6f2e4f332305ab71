"""What makes the model fast on the CPU it runs on. `model/` is complete without it, and remains the reference."""
