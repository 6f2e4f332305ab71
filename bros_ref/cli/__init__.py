"""The command line: `bros-ref`."""
