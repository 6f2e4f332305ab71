"""Checkpoints: safetensors folders, GGUF files, seeded random weights."""
