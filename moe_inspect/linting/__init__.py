"""Are these routes right? What can be told of them without a reference."""
