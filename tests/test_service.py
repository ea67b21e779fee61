"""What is asked of Prefect's server is asked again while it is busy, as Prefect's own client does."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from flows import service

ASKED: list[str] = []


@contextmanager
def server(*statuses: int) -> Iterator[str]:
    """One that answers with these, one after the other, and then with the last."""
    left = list(statuses)
    ASKED.clear()

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            ASKED.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(left.pop(0) if len(left) > 1 else left[0])
            self.end_headers()
            self.wfile.write(b'{"id": 1}')

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/api"
        finally:
            http.shutdown()
            thread.join()


def test_a_busy_server_is_asked_again():
    with server(503, 503, 200) as url:
        assert service.request(url, {"name": "x"}) == {"id": 1}
    assert [json.loads(body) for body in ASKED] == [{"name": "x"}] * 3


@pytest.mark.parametrize(("status", "again"), [(503, True), (500, False), (404, False)])
def test_not_for_ever_and_only_while_it_is_busy(monkeypatch: pytest.MonkeyPatch, status: int, again: bool):
    monkeypatch.setattr(service, "_BUSY_SECONDS", 2)
    with server(status) as url, pytest.raises(service.ServiceError, match=f"does not answer {url}.*{status}"):
        service.request(url, {})
    assert (len(ASKED) > 1) is again
