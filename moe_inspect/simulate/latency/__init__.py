"""The time of an MoE layer and of its dispatch and combine, from tokens per expert."""
