"""BROS inside other systems. Each package here needs the system it is named after, and nothing else needs it."""
