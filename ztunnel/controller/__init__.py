"""What a cluster's controller does for Gateways and statuses: what follows from objects (pure), and the loop that writes it.

The pure half (`belongings`, `statuses`) also serves the lab, which has no API server but the same objects.
"""
