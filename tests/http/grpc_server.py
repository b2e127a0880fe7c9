"""A gRPC server: bytes in, bytes out. Says `NAME PORT` once it listens; its log is what it saw.

Arguments: its name, perhaps how many milliseconds a connection may be old, its port. It stops in order
when it is asked to."""
import signal
import sys
import threading
import time
from concurrent import futures

import grpc

NAME, *AGE, PORT = sys.argv[1:]


def log(*words):
    print(*words, flush=True)


def unary(request, context):
    if request == b"slow":
        ended = threading.Event()
        context.add_callback(ended.set)
        left = context.time_remaining()
        log("slow", "deadline" if left is not None and left < 60 else "none")
        log("ended", "early" if ended.wait(20) else "never")
        return b"late"
    if request == b"fail":
        context.set_trailing_metadata((("x-sum", "42"),))
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today: ä")
    context.send_initial_metadata((("x-name", NAME),))
    context.set_trailing_metadata((("x-sum", str(len(request))),))
    return NAME.encode() + b" " + request


def download(request, context):
    for number in range(int(request)):
        if number == 20_000:
            log("download", number)
        yield b"%d" % number


def upload(requests, context):
    return b"%d" % sum(len(request) for request in requests)


def both(requests, context):
    ended, whole = threading.Event(), []
    # Not by how `requests` ends: that of a cancelled call may look half-closed at first.
    context.add_callback(lambda: (log("both", "whole" if whole else "cut"), ended.set()))
    for request in requests:
        yield request.upper()
        if request == b"first":
            ended.wait(20)
    whole.append(True)


handlers = {
    "Unary": grpc.unary_unary_rpc_method_handler(unary),
    "Download": grpc.unary_stream_rpc_method_handler(download),
    "Upload": grpc.stream_unary_rpc_method_handler(upload),
    "Both": grpc.stream_stream_rpc_method_handler(both),
}
options = [("grpc.max_connection_age_ms", int(age)) for age in AGE]
server = grpc.server(futures.ThreadPoolExecutor(32), options=options)
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
port = server.add_insecure_port("127.0.0.1:%s" % PORT)
server.start()
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(server.stop(10)))
log(NAME, port)
server.wait_for_termination()
log("stopped")
