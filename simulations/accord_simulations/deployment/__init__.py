"""A whole federation on one machine: real `accord` processes with TLS on loopback, for demonstration and tests."""
