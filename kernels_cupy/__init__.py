"""Paged-attention CUDA kernels as plain text, one launcher, three devices to run them on. Never imports bros_ref."""
