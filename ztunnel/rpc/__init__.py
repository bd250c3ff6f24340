"""gRPC, as much of it as we speak: unary calls over HTTP/2 and TLS on trio, and the protobuf wire format by hand.

Belongs here: framing, statuses, the server's and the client's shells, TLS contexts. Does not belong here: what any call means.
Why not the grpcio package: `ztunnel/decisions/0013-grpc-by-hand.md`.
"""
