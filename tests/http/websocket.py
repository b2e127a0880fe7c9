"""A WebSocket server that echoes (`serve PORT`), or a client of it (`call ENTRY COUNT LARGE`)."""
import asyncio
import sys

import websockets


async def echo(socket):
    async for message in socket:
        await socket.send(message)


async def serve(port):
    async with websockets.serve(echo, "127.0.0.1", port, max_size=None):
        print("ready", flush=True)
        await asyncio.Future()


async def call(entry, count, large):
    async with websockets.connect("ws://%s/chat" % entry, max_size=None) as socket:
        async def say():
            for number in range(count):
                await socket.send("message %d" % number)

        saying = asyncio.create_task(say())
        for number in range(count):
            assert await socket.recv() == "message %d" % number
        await saying
        await socket.send(bytes(large))
        assert await socket.recv() == bytes(large)
        # One that is silent for longer than a connection of HTTP may rest.
        await asyncio.sleep(4)
        await socket.ping()
        await socket.send("last")
        print(await socket.recv())
    print("closed", socket.close_code)


if sys.argv[1] == "serve":
    asyncio.run(serve(int(sys.argv[2])))
else:
    asyncio.run(call(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
