"""The project's own measurements. Each module measures one thing and returns plain rows for a table and for JSON."""
