"""One file a foreign format; each turns files into our batches. Nothing here imports torch but inside the one that reads its files."""
