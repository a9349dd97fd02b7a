"""What the model loses without one of its experts, measured on held-out text."""
