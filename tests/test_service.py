"""What is asked of Prefect's server is asked again while it is busy, as Prefect's own client does."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from sqlalchemy import text

from flows import cli, service
from flows.server import OneWriterAtATime


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


def test_a_link_to_a_run_outlives_the_server_of_a_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """It leads to where `entropy-probe ui` is up, unless it was made there; what runs in a deployment is told so."""
    lasting = f"http://127.0.0.1:{cli._parser().parse_args(['ui']).port}"
    assert service.lasting_address("http://127.0.0.1:40123/api", started_here=True) == lasting
    assert service.lasting_address("http://127.0.0.1:4300/api", started_here=False) == "http://127.0.0.1:4300"
    monkeypatch.setattr(service, "HOME", tmp_path)
    with service.child(
        ["-c", "import os; print(os.environ['PREFECT_UI_URL'])"], "", also={"PREFECT_UI_URL": lasting}
    ) as told:
        assert told.communicate()[0].strip() == lasting


def test_two_that_read_and_then_write_wait_for_one_another(tmp_path):
    """As when a form is sent while a sweep tells of its stages. With Prefect's own, one of them is refused at once."""

    async def both() -> int:
        database = OneWriterAtATime(connection_url=f"sqlite+aiosqlite:///{tmp_path / 'prefect.db'}")
        engine = await database.engine()
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE counts AS SELECT 0 AS count"))

        async def add_one() -> None:
            async with await database.session(engine) as session, database.begin_transaction(session):
                count = (await session.execute(text("SELECT count FROM counts"))).scalar_one()
                await asyncio.sleep(0.2)
                await session.execute(text("UPDATE counts SET count = :count"), {"count": count + 1})

        await asyncio.gather(add_one(), add_one())
        async with await database.session(engine) as session:
            return (await session.execute(text("SELECT count FROM counts"))).scalar_one()

    assert asyncio.run(both()) == 2
