"""The L7 proxy: waypoint of a service account, a service or a namespace, and ingress gateway, with one engine."""
