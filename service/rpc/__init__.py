"""The gRPC side: messages to requests, events to messages, errors to status codes. It knows no tensor."""
