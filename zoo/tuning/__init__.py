"""Fine-tuning in pieces: freezing, adapters, groups of parameters, memory."""
