"""Records traces: reads a corpus, runs a model on it and captures the choices of its routers."""
