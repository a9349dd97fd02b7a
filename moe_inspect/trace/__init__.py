"""The trace: what the columns mean, who writes them, who reads them. Nothing here imports torch."""
