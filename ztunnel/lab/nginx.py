"""Runs nginx as a container of the lab: `nginx.py NGINX PORT...`. A configuration of its own, in the foreground, one process.

nginx's master would drop its privileges, and give its directories, to a user that a user namespace may not have; without a master and
with `user root` it stays who it is. Everything it writes is in a /tmp that only this container sees and that goes with it; its logs go
to the container's output.
"""

import ctypes
import os
import sys

CONFIGURATION = """daemon off;
user root root;
master_process off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log /dev/stdout;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
{listens}
        location / {{ return 200 "nginx on $hostname\\n"; }}
    }}
}}
"""


def main() -> None:
    """Write the configuration and become nginx."""
    program, ports = sys.argv[1], sys.argv[2:] or ["80"]
    if ctypes.CDLL(None, use_errno=True).mount(b"tmpfs", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None) != 0:
        sys.exit(f"cannot make a /tmp for nginx: {os.strerror(ctypes.get_errno())}")
    directory = "/tmp"  # noqa: S108 - the line above made it ours alone
    v6 = os.path.exists("/proc/net/if_inet6")
    listens = "\n".join(f"        listen {port};" + (f"\n        listen [::]:{port};" if v6 else "") for port in ports)
    path = os.path.join(directory, "nginx.conf")
    with open(path, "w", encoding="ascii") as target:
        target.write(CONFIGURATION.format(directory=directory, listens=listens))
    os.execv(program, [program, "-p", directory, "-c", path, "-e", "stderr"])  # noqa: S606


if __name__ == "__main__":
    main()
