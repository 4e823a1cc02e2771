"""Answering clients."""

import os

# Read when grpcio is imported, which gRPC reflection does. Its fork handlers are for processes that go on as gRPC after
# a fork; ours execute another program, and with the handlers (uvloop forks, where Python itself would not run them) one
# in a hundred crashes first.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
