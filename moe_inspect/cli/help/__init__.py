"""The pages of `--help`: groups of options, examples, and what a shell completes."""
