"""Secure aggregation: the coordinator learns the sum of one agreed set of updates (`shared/PROTOCOL.md`)."""
