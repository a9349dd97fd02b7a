"""The trace format: its schema, writer, reader and verifier, and the merging of traces. Nothing
here imports torch.

May import: errors, files, later, progress, text.
"""
