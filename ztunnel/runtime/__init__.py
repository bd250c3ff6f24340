"""What every daemon of ours needs and none of them owns: log lines, metrics, a small HTTP/1.1 server, reading YAML and JSON.

Belongs here: code that two programs share and that knows nothing of pods, tunnels or policies beyond the names in metrics and logs.
Does not belong here: anything that one program uses alone.
"""
