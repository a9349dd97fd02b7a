"""Which experts to drop, what the model loses without them, and the checkpoint without them."""
