"""The data plane: what runs in a worker process, per byte and per event.

An edge-triggered epoll loop with callbacks, tunnels over sockets, relays between sockets and streams, and the messages that
join a worker to its supervisor. No trio and no coroutine here, no policy of its own: what to do with a connection is decided
in `proxy` by asking `mesh`. State that must survive a hand-over is plain data.
"""
