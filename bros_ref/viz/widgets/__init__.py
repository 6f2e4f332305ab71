"""Interactive players and panels; each is one piece of HTML that needs no kernel, or a thin ipywidgets panel."""
