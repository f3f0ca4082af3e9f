"""Requests to a queue, those for the short way and those for aiohttp's."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from message_queue.core.ids import message_id

HEAD = b"Host: 127.0.0.1:8000\r\nAccept: */*\r\nX-Request-Id: r-1\r\n"
PROBLEM = b"Host: x\r\nAccept: application/problem+json\r\n"
NOWHERE, ODD, WAIT = 62, 61, 60
"""Partitions: of the first nobody can say what became of it, the owner of the second talks
nonsense, that of the third answers when the test says so."""


def dot(seq: int) -> int:
    return 5 << 40 | seq


def name(partition: int, seq: int) -> str:
    """An id: seqs that 5 divides were never issued, those that 7 divides are overtaken."""
    return message_id(partition, dot(seq))


def get(path: bytes, head: bytes = HEAD) -> bytes:
    return b"GET %s HTTP/1.1\r\n%s\r\n" % (path, head)


def post(path: bytes, body: object, head: bytes = HEAD) -> bytes:
    text = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return b"POST %s HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (path, head, len(text), text)


def produce(queue: str, head: bytes = HEAD, **fields: object) -> bytes:
    return post(b"/produce", {"queue": queue, "body": [1, "ü"], **fields}, head)


def ack(*named: tuple[int, int], **fields: object) -> bytes:
    ids: Sequence[str] = [name(*each) for each in named]
    which = {"message_id": ids[0]} if len(ids) == 1 else {"message_ids": ids}
    return post(b"/ack", which | fields)


NEXT = {"queue": "ready", "max": 3, "wait_ms": 5}
SHORT = {
    "produce": produce("q"),
    "batch": post(b"/produce", {"queue": "q", "messages": [{"body": 1}, {"body": {"a": []}}]}),
    "all fields": produce("q", headers={"a": 1}, delay_ms=5, priority=9, ttl_ms=7,
                          dedupe_id="d", group_id="g"),
    "duplicate": produce("dup"),
    "unknown outcome": produce("gone"),
    "no quorum": produce("none"),
    "full, at once": produce("at-once"),
    "an owner that answers nonsense": produce("bad"),
    "a crash": produce("boom"),
    "no body": post(b"/produce", {"queue": "q"}),
    "both bodies": post(b"/produce", {"queue": "q", "body": 1, "messages": [{"body": 1}]}),
    "bad field": produce("q", priority=10),
    "unknown field": produce("q", colour="red"),
    "no json": post(b"/produce", b"{"),
    "deep": post(b"/produce", b'{"queue":"q","body":' + b"[" * 70 + b"]" * 70 + b"}"),
    "huge number": post(b"/produce", b'{"queue":"q","body":99999999999999999999}'),
    "no utf-8": post(b"/produce", b'{"queue":"q","body":"\xff"}'),
    "lone surrogate": post(b"/produce", b'{"queue":"q","body":"\\ud800"}'),
    "long name": produce("ü" * 200),
    "own request id": produce("q", b"host: a\r\nX-REQUEST-ID: a.b:c-\r\n"),
    "kept alive": produce("q", HEAD + b"Connection: Keep-Alive\r\n"),
    "no request id": produce("q", b"Host: a\r\nUser-Agent: x\r\nContent-Type: text/plain\r\n"),
    "behind a proxy": produce("q", HEAD + b"Via: 1.1 x\r\nX-Forwarded-For: 1.2.3.4, 5\r\n"),
    "traced": produce("q", HEAD + b"X-Amzn-Trace-Id: Root=1\r\ntraceparent: 00-1-2-01\r\n"),
    "ready": get(b"/consume?queue=ready"),
    "ready, many": get(b"/consume?queue=ready&max=10&wait_ms=0&visibility_ms=5"),
    "escaped": get(b"/consume?queue=ready%20%C3%A4+x%2541"),
    "later": get(b"/consume?queue=later&wait_ms=5"),
    "may be forwarded": get(b"/consume?queue=ready&forward=true"),
    "empty": get(b"/consume?queue=empty"),
    "consume 503": get(b"/consume?queue=gone"),
    "consume crashes": get(b"/consume?queue=boom"),
    "consume, length 0": get(b"/consume?queue=ready", HEAD + b"Content-Length: 0\r\n"),
    "ack": ack((1, 1)),
    "ack with receipt": ack((1, 1), receipt="5.1"),
    "ack 404": ack((1, 5)),
    "ack 409": ack((1, 7)),
    "ack, no id": post(b"/ack", {"message_id": "nobody"}),
    "ack, strange partition": post(b"/ack", {"message_id": name(100, 1)}),
    "ack, unknown outcome": ack((NOWHERE, 1)),
    "ack, nonsense": ack((ODD, 1)),
    "acks": ack((1, 1), (2, 5), (1, 7), (3, 1), (2, 2)),
    "acks, one unknown": ack((1, 1), (NOWHERE, 1), (3, 5)),
    "acks, one nonsense": ack((1, 1), (ODD, 1), (3, 5)),
    "acks, no ids": post(b"/ack", {"message_ids": ["a", "b"]}),
    "acks with a receipt": ack((1, 1), (1, 2), receipt="5.1"),
    "ack nothing": post(b"/ack", {}),
    "ack twice": post(b"/ack", {"message_id": "a", "message_ids": ["a"]}),
    "ack and fetch": ack((1, 1), next=NEXT),
    "acks and fetch": ack((1, 1), (2, 1), next=NEXT | {"queue": "later"}),
    "ack, overtaken, fetches nothing": ack((1, 7), next=NEXT),
    "ack and fetch a long name": ack((1, 1), next={"queue": "ü" * 200}),
    "ack and fetch crashes": ack((1, 1), next={"queue": "boom"}),
    "nack": post(b"/nack", {"message_id": name(1, 1), "receipt": "5.1", "delay_ms": 9}),
    "nack 404": post(b"/nack", {"message_id": name(1, 5)}),
    "nack, no id": post(b"/nack", {"message_id": "nobody"}),
    "nack, bad": post(b"/nack", {"message_id": name(1, 1), "delay_ms": -1}),
    "extend": post(b"/extend", {"message_id": name(1, 1), "visibility_ms": 9}),
    "extend, no id": post(b"/extend", {"message_id": "nobody", "visibility_ms": 9}),
    "extend, no time": post(b"/extend", {"message_id": name(1, 1)}),
}  # fmt: skip
"""What takes the short way."""

LONG = {
    "not to be forwarded": get(b"/consume?queue=ready&forward=false"),
    "produce here only": post(b"/produce?forward=false", {"queue": "q", "body": 1}),
    "produce, may be forwarded": post(b"/produce?forward=true", {"queue": "q", "body": 1}),
    "produce, query": post(b"/produce?", {"queue": "q", "body": 1}),
    "no queue": get(b"/consume"),
    "empty query": get(b"/consume?"),
    "twice": get(b"/consume?queue=a&queue=b"),
    "unknown parameter": get(b"/consume?queue=ready&colour=red"),
    "bad parameter": get(b"/consume?queue=ready&max=0"),
    "nul": get(b"/consume?queue=ready%00"),
    "long query": get(b"/consume?queue=ready" + b"y" * 600),
    "consume with a body": get(b"/consume?queue=ready", HEAD + b"Content-Length: 2\r\n") + b"{}",
    "head": get(b"/consume?queue=ready").replace(b"GET", b"HEAD"),
    "wrong verb": get(b"/produce"),
    "post consume": post(b"/consume?queue=ready", b"{}"),
    "absolute": post(b"http://x/produce", {"queue": "q", "body": 1}),
    "escaped path": post(b"/%70roduce", {"queue": "q", "body": 1}),
    "unknown": get(b"/nothing"),
    "status": get(b"/status"),
    "problem": post(b"/produce", b"{", PROBLEM),
    "page": produce("q", HEAD + b"Origin: http://127.0.0.1:8000\r\n"),
    "foreign page": produce("q", HEAD + b"Origin: http://evil\r\n"),
    "odd request id": produce("q", b"Host: x\r\nX-Request-Id: a b\r\n"),
    "empty request id": produce("q", b"Host: x\r\nX-Request-Id:\r\n"),
    "two request ids": produce("q", HEAD + b"x-request-id: r-2\r\n"),
    "to be closed": produce("q", HEAD + b"Connection: close\r\n"),
    "old": produce("q").replace(b"HTTP/1.1", b"HTTP/1.0"),
    "old, kept": produce("q", HEAD + b"Connection: keep-alive\r\n").replace(b"/1.1", b"/1.0"),
    "waits for its go": produce("q", HEAD + b"Expect: 100-continue\r\n"),
    "unknown header": produce("q", HEAD + b"Colour: red\r\n"),
    "packed": produce("q", HEAD + b"Content-Encoding: gzip\r\n"),
    "empty body": post(b"/produce", b""),
    "too big": post(b"/produce", b'{"queue":"q","body":"%b"}' % (b"x" * 2000)),
    "chunked": b"POST /produce HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n%b0\r\n\r\n"
               % (HEAD, b'12\r\n{"queue":"q","body\r\n4\r\n":1}\r\n'),
    "no host": post(b"/produce", {"queue": "q", "body": 1}, b""),
    "two lengths": produce("q", HEAD + b"Content-Length: 3\r\n"),
    "upgrade": get(b"/consume?queue=ready", HEAD + b"Connection: upgrade\r\nUpgrade: h2c\r\n"),
    "stream": get(b"/stream", HEAD + b"Connection: upgrade\r\nUpgrade: websocket\r\n"),
}  # fmt: skip
"""What goes aiohttp's way."""
