"""BROS inside other systems. Each package here needs the system that it is named after; nothing else depends on it."""
