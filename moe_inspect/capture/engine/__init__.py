"""Records routing inside a serving engine, for as long as it serves: `MOE_INSPECT_TRACE=DIR vllm
serve …`. In the engine's process a few rows are copied after each step; another process writes."""
