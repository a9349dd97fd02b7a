"""Two models that cannot be compared decision by decision, side by side."""
