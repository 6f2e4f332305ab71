"""bros_ref: a readable, real implementation of BROS (arXiv 2504.09590)."""

__version__ = "0.1.0"
