"""Are this trace's files whole, and its routes right? The routes are judged without a reference."""
