"""gRPC over HTTP/2, the serving side alone, on asyncio.

Why our own: a `grpc.aio` server takes twice the time for each request, holds Python's lock while it copies a message
three times (30 MB stop the loop for 13 ms), and refuses what is too much before anybody can say why. Here a message is
received where it stays, in steps that do not depend on its size.

`frames` and `headers` are the wire, `messages` what lies in DATA, `connection` one peer, `call` what a handler sees.
Sources: RFC 9113 (HTTP/2), RFC 7541 (HPACK, by the `hpack` package), "gRPC over HTTP2" of the gRPC project.
"""
