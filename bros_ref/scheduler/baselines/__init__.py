"""Other systems' schedulers, one per file."""
