"""Left of the trace: the corpus, the model, its routers, and the record of what they decided."""
