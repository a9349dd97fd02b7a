"""What a trace would cost under other assumptions: placements, batches, capacities, caches,
routers. A trace is all it needs."""
