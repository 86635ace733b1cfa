"""What Accord's long-lived processes share: calls, sockets, keys at rest, logs. This is where shared does I/O."""
