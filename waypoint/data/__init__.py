"""The worker's data path on `ztunnel.dataplane.loop`: codecs, tunnels, pools, exchanges. No trio."""
