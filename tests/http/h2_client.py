"""A client of HTTP/2 that does what its first argument names at the entry of its second."""
import socket
import sys

import h2.connection
import h2.events

what, entry = sys.argv[1], sys.argv[2]
host, port = entry.split(":")
tcp = socket.create_connection((host, int(port)), timeout=30)
connection = h2.connection.H2Connection()
connection.initiate_connection()
resets = []


def begin(stream, method, path, fields=(), end=False):
    head = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "web")]
    connection.send_headers(stream, head + list(fields), end_stream=end)
    tcp.sendall(connection.data_to_send())


def events():
    for event in connection.receive_data(tcp.recv(65536)):
        if isinstance(event, h2.events.StreamReset):
            resets.append(event.stream_id)
        if isinstance(event, h2.events.DataReceived):
            connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        yield event
    tcp.sendall(connection.data_to_send())


def answer(stream, upload=0):
    """Status and body, while as much of `upload` is sent as may be; None for one that was reset."""
    status, body = None, b""
    while True:
        while upload and connection.local_flow_control_window(stream) > 0:
            size = min(upload, connection.local_flow_control_window(stream), 16384)
            upload -= size
            connection.send_data(stream, b"u" * size, end_stream=upload == 0)
            tcp.sendall(connection.data_to_send())
        ended = False
        for event in events():
            if getattr(event, "stream_id", None) != stream:
                continue
            if isinstance(event, h2.events.ResponseReceived):
                status = dict(event.headers)[b":status"].decode()
            elif isinstance(event, h2.events.DataReceived):
                body += event.data
            elif isinstance(event, h2.events.StreamEnded):
                ended = True
            elif isinstance(event, h2.events.StreamReset) and not ended:
                return None
        if ended:
            return status, body.decode()


if what == "early":
    begin(1, "POST", "/early", [("content-length", "8000000")])
    print(*answer(1, 8_000_000))
elif what == "refused":
    # Refused by its head; half of the body is on its way then, and the other half comes after the answer.
    begin(1, "POST", "/echo", [("x-murmesh-deadline-ms", "soon"), ("content-length", "60000")])
    for is_last in (False, True):
        for _ in range(3):
            connection.send_data(1, b"u" * 10_000)
        if is_last:
            connection.end_stream(1)
        tcp.sendall(connection.data_to_send())
        if not is_last:
            print(answer(1)[0])
    begin(3, "GET", "/", end=True)
    print(*answer(3))
    begin(5, "HEAD", "/", [("x-murmesh-deadline-ms", "soon")], end=True)
    print(*answer(5), end="|\n")
    print(resets)
elif what == "cancel":
    # An upload of no known length that is given up in the middle.
    begin(1, "POST", "/echo", [("x-id", "cancelled")])
    connection.send_data(1, b"half of it")
    tcp.sendall(connection.data_to_send())
    begin(3, "GET", "/", end=True)
    print(*answer(3))
    connection.reset_stream(1, 8)
    tcp.sendall(connection.data_to_send())
    begin(5, "GET", "/", end=True)
    print(*answer(5))
elif what == "cut":
    begin(1, "GET", "/cut-chunked", end=True)
    print(answer(1))
elif what == "open":
    # A request that may go on for ever, as a stream of gRPC in both directions.
    begin(1, "POST", "/")
    connection.send_data(1, b"first")
    tcp.sendall(connection.data_to_send())
    print(answer(1)[0])
elif what == "unread":
    # A download of small messages of gRPC, of which only the first window is taken.
    begin(1, "POST", "/test.Test/Download", [("content-type", "application/grpc"), ("te", "trailers")])
    connection.send_data(1, b"\0\0\0\0\x06100000", end_stream=True)
    tcp.sendall(connection.data_to_send())
    tcp.settimeout(300)
    while tcp.recv(65536):
        pass
elif what == "many":
    for number in range(int(sys.argv[3])):
        stream = 2 * number + 1
        begin(stream, "GET", "/", end=True)
        assert answer(stream)[0] == "200"
    print("all")
