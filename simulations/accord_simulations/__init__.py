"""The simulation harness: many participants on one machine, the same server and client code."""
