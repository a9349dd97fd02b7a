"""What a model is fed: sources, documents, tokens, batches."""
