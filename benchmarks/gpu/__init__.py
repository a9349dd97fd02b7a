"""`python -m benchmarks.gpu`: what recording costs on this machine's CUDA GPU."""
