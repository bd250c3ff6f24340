"""The `ztunnel` command. No logic: it asks a daemon, a lab or a settings file, and prints.

Start-up is under 200 ms, so nothing imported by `main` may import trio, pyroute2, cryptography, yaml or prometheus_client;
heavy imports happen inside the command that needs them.
"""
