"""What is asked of Prefect's server is asked again while it is busy, as Prefect's own client does."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from flows import service


@contextmanager
def server(*statuses: int) -> Iterator[tuple[str, list[object]]]:
    """One that answers with these, one after the other, and then with the last; its address, and what it was asked."""
    asked: list[object] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(statuses[min(len(asked), len(statuses) - 1)])
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.end_headers()
            self.wfile.write(b'{"id": 1}')

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/api", asked
        finally:
            http.shutdown()
            thread.join()


def test_a_busy_server_is_asked_again():
    with server(503, 503, 200) as (url, asked):
        assert service.request(url, {"name": "x"}) == {"id": 1}
    assert asked == [{"name": "x"}] * 3


@pytest.mark.parametrize(("status", "again"), [(503, True), (500, False), (404, False)])
def test_not_for_ever_and_only_while_it_is_busy(monkeypatch: pytest.MonkeyPatch, status: int, again: bool):
    monkeypatch.setattr(service, "_BUSY_SECONDS", 2)
    with server(status) as (url, asked), pytest.raises(service.ServiceError, match=f"does not answer {url}.*{status}"):
        service.request(url, {})
    assert (len(asked) > 1) is again
