"""What this machine can record, and what recording costs on it: `moe-inspect doctor`."""
