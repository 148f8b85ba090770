"""A TCP proxy before an HTTP server that can refuse, hang, answer 503, truncate, or be slow."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CUT_AFTER = 1500  # bytes of a connection's answers: headers and small answers pass, data does not
SLOW = 2**15  # bytes a piece, with a hundredth of a second between


class Proxy:
    """A proxy whose `mode` applies to new and open connections.

    Modes: "pass", "refuse" (nobody listens), "hang" (no answer), "503", "truncate", "slow".
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self._target, self._mode, self.connections = (host, int(port)), "pass", 0
        self._listener = self._listen(0)
        self.port = self._listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._open: set[socket.socket] = set()

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        refused, self._mode = self._mode == "refuse", mode
        if mode == "refuse":
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        elif refused:
            self._listener = self._listen(self.port)
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._open.add(client)
        with suppress(OSError), client:
            if self._mode == "refuse":
                return  # accepted right before
            if self._mode == "hang":
                while client.recv(2**16):
                    pass
            elif self._mode == "503":
                client.recv(2**16)
                client.sendall(
                    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection:"
                    b" close\r\n\r\n"
                )
            else:
                with socket.create_connection(self._target) as server:
                    self._open.add(server)
                    threading.Thread(
                        target=self._copy, args=(client, server, False), daemon=True
                    ).start()
                    self._copy(server, client, self._mode == "truncate")
                    self._open.discard(server)
        self._open.discard(client)

    def _copy(self, source: socket.socket, target: socket.socket, cut: bool) -> None:
        remaining = CUT_AFTER
        with suppress(OSError):
            while data := source.recv(SLOW):
                if self._mode == "slow":
                    time.sleep(0.01)
                if cut:
                    data, remaining = data[:remaining], remaining - len(data)
                target.sendall(data)
                if cut and remaining <= 0:
                    break
        for connection in (source, target):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.mode = "refuse"


@contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    server = Proxy(target)
    try:
        yield server
    finally:
        server.close()
