"""Generated from accord.proto by grpcio-tools 1.81.1 (the last that knows protobuf 6); see README.md beside it."""
