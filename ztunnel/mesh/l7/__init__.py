"""What an L7 proxy is configured with: derived from manifests, pure, the same values for the proxy, its status and every explanation."""
