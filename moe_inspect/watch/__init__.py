"""Shows a trace while it is being written: in the terminal, as a page, and to Prometheus."""
