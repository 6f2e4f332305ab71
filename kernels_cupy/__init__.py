"""Paged-attention CUDA kernels as plain text, one launcher, and three devices that run them. Never imports bros_ref."""
