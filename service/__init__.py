"""The service: bundles in, gRPC out. It knows tensors, states and rules; it knows no mechanism by name."""
