"""Measurements of speed, memory and size; their results, with the hardware that gave them."""
