"""What is told of requests: metrics, access logs, spans."""
