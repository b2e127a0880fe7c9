"""A gRPC client: does what its first argument names against the entry at its second, and prints what
it saw, one fact a line."""
import sys
import threading
import time

import grpc

what, entry = sys.argv[1], sys.argv[2]
channel = grpc.insecure_channel(entry)
unary = channel.unary_unary("/test.Test/Unary")
download = channel.unary_stream("/test.Test/Download")
upload = channel.stream_unary("/test.Test/Upload")
both = channel.stream_stream("/test.Test/Both")


def failure(call):
    try:
        call()
    except grpc.RpcError as error:
        trailing = dict(error.trailing_metadata() or ())
        return error.code().name, error.details(), trailing
    return "OK", "", {}


if what == "kinds":
    answer, call = unary.with_call(b"hello", timeout=20)
    print("unary", answer.decode(), dict(call.initial_metadata())["x-name"],
          dict(call.trailing_metadata())["x-sum"])
    large = b"l" * 3_000_000
    print("large", unary(large, timeout=20) == answer.split()[0] + b" " + large)
    print("download", [int(item) for item in download(b"1000", timeout=20)] == list(range(1000)))
    print("upload", upload(iter([b"u" * 1000] * 1000), timeout=20).decode())
    # Each message waits for the answer to the one before: both directions at once.
    turn, heard = threading.Semaphore(1), []

    def said():
        for number in range(100):
            turn.acquire()
            yield b"message %d" % number

    for answer in both(said(), timeout=20):
        heard.append(answer)
        turn.release()
    print("both", heard == [b"MESSAGE %d" % number for number in range(100)])
    code, details, trailing = failure(lambda: unary(b"fail", timeout=20))
    print("status", code, details, trailing.get("x-sum"))
elif what == "deadline":
    started = time.monotonic()
    code, _, _ = failure(lambda: unary(b"slow", timeout=0.5))
    print(code, "at once" if time.monotonic() - started < 5 else "late")
elif what == "cancel":
    turn = threading.Event()

    def said():
        yield b"first"
        turn.wait(20)

    call = both(said())
    print(next(call).decode())
    call.cancel()
    turn.set()
    print(failure(lambda: next(call))[0])
elif what == "refused":
    code, details, trailing = failure(lambda: unary(b"hello", timeout=20))
    print(code, trailing.get("x-murmesh-reason"), details)
elif what == "limited":
    metadata = (("x-murmesh-deadline-ms", "300"),)
    code, details, _ = failure(lambda: unary(b"slow", timeout=20, metadata=metadata))
    print(code, details)
elif what == "many":
    shares = {}
    for _ in range(int(sys.argv[3])):
        name = unary(b"hello", timeout=20).split()[0].decode()
        shares[name] = shares.get(name, 0) + 1
    print(*(shares[name] for name in sorted(shares)))
elif what == "steady":
    # Calls without a pause for so many seconds, on a few connections. Says how many went well, how
    # many the server itself cancelled, and whatever else came.
    ends, codes = time.monotonic() + float(sys.argv[3]), {}

    def steady():
        channel = grpc.insecure_channel(entry, [("grpc.use_local_subchannel_pool", 1)])
        unary = channel.unary_unary("/test.Test/Unary")
        while time.monotonic() < ends:
            code, details, trailing = failure(lambda: unary(b"hello", timeout=20))
            why = (code, trailing.get("x-murmesh-reason"), details)
            codes[why] = codes.get(why, 0) + 1

    callers = [threading.Thread(target=steady) for _ in range(4)]
    [caller.start() for caller in callers]
    [caller.join() for caller in callers]
    print(codes.pop(("OK", None, ""), 0), codes.pop(("CANCELLED", None, "CANCELLED"), 0), codes)
elif what == "unknown":
    unknown = channel.unary_unary("/test.Test/Unknown")
    for _ in range(int(sys.argv[3])):
        code, details, trailing = failure(lambda: unknown(b"hello", timeout=20))
        assert code == "UNIMPLEMENTED", (code, details)
    print(code, trailing.get("x-murmesh-reason"))
