"""Steps of a trace, and what they cost."""
