"""Pure functions from traces and results to figures and pages."""
