"""The coordinator: rounds, aggregation, server optimisers, checkpoints. No torch."""
