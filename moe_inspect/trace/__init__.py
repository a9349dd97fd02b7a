"""The trace format: its schema, writer, reader and verifier. Nothing here imports torch."""
