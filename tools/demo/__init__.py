"""The recipe of the bundled model: its texts, its training, its card."""
