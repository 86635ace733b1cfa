"""A symbolic model of secure aggregation, explored exhaustively."""
