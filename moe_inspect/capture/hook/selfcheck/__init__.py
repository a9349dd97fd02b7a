"""Compares each kernel with its reference on the user's own device, the first time it runs there.
The module `kernels` is an argument here: it is what calls this one."""
