"""HTTP/1.1 for clients that speak no gRPC: connection by connection, on the loop.

`connection` knows HTTP and nothing of what is served; `routes` finds who answers a path; the rest are the protocols.
"""
