"""The peers, each with the settings that make it as durable as it can be.

RabbitMQ 3.10 quorum queue on three nodes (synced on a majority); NATS JetStream, three replicas,
file storage (2.9 never syncs: a power cut takes what it confirmed); one Redis with a stream and
appendfsync always, one beanstalkd with -f 0 (both synced, neither replicated: one disk is all
there is).
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from systems import QUEUE, Acks, Session, System, listening
from wires import Amqp, Beanstalk, Nats, Resp

RABBIT = "/usr/lib/rabbitmq/bin"


class RabbitMQ(System):
    """Pushed deliveries with a prefetch, publisher confirms."""

    name = "RabbitMQ"
    needs = ("rabbitmq-server", "rabbitmqctl", "epmd")
    ports = (25681, 25682, 25683)
    epmd_port = 24369

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._clustered = False

    def _env(self, n: int) -> dict[str, str]:
        home = f"{self.root}/{n}"
        return {
            "HOME": str(self.root), "RABBITMQ_NODENAME": f"rb{n}@localhost",
            "RABBITMQ_MNESIA_BASE": f"{home}/mnesia", "RABBITMQ_LOG_BASE": f"{home}/log",
            "RABBITMQ_NODE_PORT": str(self.ports[n]), "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_DIST_PORT": str(self.ports[n] + 100),
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{home}/plugins",
            "RABBITMQ_CONF_ENV_FILE": f"{home}/none", "RABBITMQ_CONFIG_FILE": f"{home}/none",
            "ERL_EPMD_ADDRESS": "127.0.0.1", "ERL_EPMD_PORT": str(self.epmd_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS":
                "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_PID_FILE": f"{home}/pid",
        }  # fmt: skip

    async def start(self) -> None:
        cookie = self.root / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text("QUEUEBENCH")
            cookie.chmod(0o400)
        # Ours to start and to end; else Erlang leaves one behind.
        self.run(["epmd", "-port", str(self.epmd_port), "-address", "127.0.0.1"], "epmd.log")
        await listening(self.epmd_port, self.processes[0])
        for n in range(3):
            (self.root / str(n)).mkdir(exist_ok=True)
            (self.root / str(n) / "plugins").write_text("[].\n")
            self.run([f"{RABBIT}/rabbitmq-server"], f"rabbit{n}.log", self._env(n))
        for port, process in zip(self.ports, self.processes[1:], strict=True):
            await listening(port, process)
        if not self._clustered:
            await self._control(0, "await_startup")
            await asyncio.gather(*(self._join(n) for n in (1, 2)))
            self._clustered = True
        while True:
            with suppress(ConnectionError, OSError, TimeoutError):
                wire = await Amqp.connect(self.ports[0])
                await asyncio.wait_for(wire.declare(QUEUE), 2)
                wire.close()
                return
            await asyncio.sleep(0.05)

    async def _join(self, n: int) -> None:
        for command in (["await_startup"], ["stop_app"], ["join_cluster", "rb0@localhost"],
                        ["start_app"]):  # fmt: skip
            await self._control(n, *command)

    async def _control(self, n: int, *command: str) -> None:
        process = await asyncio.create_subprocess_exec(
            f"{RABBIT}/rabbitmqctl", "-n", f"rb{n}@localhost", *command,
            env={**os.environ, **self._env(n)}, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"rabbitmqctl {command}: {output.decode()[-500:]}")

    def _signal(self, number: int) -> None:
        super()._signal(number)
        # Erlang may have started one as a daemon, on this port of ours.
        subprocess.run(
            ["epmd", "-port", str(self.epmd_port), "-kill"], capture_output=True, check=False
        )

    def pids(self) -> list[int]:
        return [pid for process in self.processes for pid in family(process.pid)]

    async def fresh(self) -> None:
        wire = await Amqp.connect(self.ports[0])
        await wire.delete(QUEUE)
        await wire.declare(QUEUE)
        wire.close()
        await asyncio.sleep(0.3)

    async def stored(self) -> int:
        wire = await Amqp.connect(self.ports[0])
        count = await wire.declare(QUEUE)
        wire.close()
        return count

    async def connect(self) -> Session:
        return _AmqpSession(await Amqp.connect(self.ports[0]))


class _AmqpSession(Session):
    def __init__(self, wire: Amqp) -> None:
        self.wire = wire

    async def produce(self, body: bytes) -> None:
        await self.wire.publish(QUEUE, [body])[0]

    async def produce_many(self, bodies: list[bytes]) -> None:
        await asyncio.gather(*self.wire.publish(QUEUE, bodies))

    async def subscribe(self, prefetch: int, batch: int = 1) -> None:
        await self.wire.subscribe(QUEUE, prefetch)

    async def take(self, most: int, wait_s: float) -> list[bytes]:
        wire = self.wire
        if not wire.delivered:
            wire.arrived = wire.loop.create_future()
            try:
                await asyncio.wait_for(wire.arrived, wait_s)
            except TimeoutError:
                return []
        self.arrived_s = time.perf_counter()
        taken = [wire.delivered.popleft() for _ in range(min(most, len(wire.delivered)))]
        # Its acks are not confirmed: the protocol has no answer to them.
        wire.ack(taken[-1][0], multiple=True)
        return [body for _, body in taken]

    def close(self) -> None:
        self.wire.close()


class JetStream(System):
    """Work queue stream; pulled deliveries, acks confirmed."""

    name = "NATS R3"
    needs = ("nats-server",)
    durable = False
    ports = (24221, 24222, 24223)

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._leader = self.ports[0]

    async def start(self) -> None:
        routes = ", ".join(f'"nats://127.0.0.1:{port + 1000}"' for port in self.ports)
        for n, port in enumerate(self.ports):
            file = self.root / f"{n}.conf"
            file.write_text(
                f'server_name: n{n}\nlisten: "127.0.0.1:{port}"\n'
                f'jetstream {{ store_dir: "{self.root}/{n}" }}\n'
                f'cluster {{ name: c, listen: "127.0.0.1:{port + 1000}", routes: [{routes}] }}\n'
            )
            self.run(["nats-server", "-c", str(file)], f"nats{n}.log")
        for port, process in zip(self.ports, self.processes, strict=True):
            await listening(port, process)
        await self._leader_known()

    async def _leader_known(self) -> None:
        for _ in range(1000):
            if await self._find_leader():
                return
            await asyncio.sleep(0.03)
        raise RuntimeError("NATS elects nobody")

    async def _find_leader(self) -> bool:
        with suppress(TimeoutError, OSError, ValueError):
            found = await self._api("STREAM.INFO.Q", within_s=0.5)
            if "state" in found and found.get("cluster", {}).get("leader"):
                self._leader = self.ports[int(found["cluster"]["leader"][1:])]
                return True
            return bool(found.get("error", {}).get("code") == 404)
        return False

    async def _api(self, what: str, body: object = None, within_s: float = 5) -> Any:
        wire = await Nats.connect(self._leader)
        try:
            text = json.dumps(body or {}).encode()
            asked = wire.request(b"$JS.API." + what.encode(), text)
            return json.loads(await asyncio.wait_for(asked, within_s))
        finally:
            wire.close()

    async def fresh(self) -> None:
        stream = {
            "name": "Q", "subjects": ["q"], "storage": "file", "num_replicas": 3,
            "retention": "workqueue", "max_consumers": -1, "max_msgs": -1, "max_bytes": -1,
        }  # fmt: skip
        consumer = {"stream_name": "Q", "config": {
            "durable_name": "c", "ack_policy": "explicit", "deliver_policy": "all",
            "ack_wait": 60_000_000_000, "max_ack_pending": 20_000, "max_waiting": 512,
            "replay_policy": "instant"}}  # fmt: skip
        await self._until_done("STREAM.CREATE.Q", stream, first="STREAM.DELETE.Q")
        await self._until_done("CONSUMER.DURABLE.CREATE.Q.c", consumer)
        await self._leader_known()
        await asyncio.sleep(0.3)

    async def _until_done(self, what: str, body: object, first: str = "") -> None:
        for _ in range(100):
            with suppress(TimeoutError):
                if first:
                    await self._api(first)
                if "error" not in await self._api(what, body):
                    return
            await asyncio.sleep(0.2)
        raise RuntimeError(f"NATS does not {what}")

    async def stored(self) -> int:
        return int((await self._api("STREAM.INFO.Q"))["state"]["messages"])

    async def connect(self) -> Session:
        return _NatsSession(await Nats.connect(self._leader))


class _NatsSession(Session):
    def __init__(self, wire: Nats) -> None:
        self.wire = wire
        self._got: list[tuple[bytes, bytes]] = []
        wire.on_message = self._on_message
        self._acks = Acks()
        self._wanted = 0
        self._full: asyncio.Future[None] | None = None

    def _on_message(self, reply_to: bytes, body: bytes) -> None:
        self._got.append((reply_to, body))
        if len(self._got) >= self._wanted and self._full is not None and not self._full.done():
            self._full.set_result(None)

    async def produce(self, body: bytes) -> None:
        answer = await self.wire.request(b"q", body)
        assert b'"seq"' in answer, answer

    async def produce_many(self, bodies: list[bytes]) -> None:
        await asyncio.gather(*[self.wire.request(b"q", body) for body in bodies])

    async def take(self, most: int, wait_s: float) -> list[bytes]:
        self._got, self._wanted = [], most
        self._full = self.wire.loop.create_future()
        no_wait = b',"no_wait":true' if most > 1 else b""
        pull = b'{"batch":%d,"expires":%d%b}' % (most, int(wait_s * 1e9), no_wait)
        # Messages come to the inbox's subscription; its own answer is a status: no more for now.
        status = self.wire.request(b"$JS.API.CONSUMER.MSG.NEXT.Q.c", pull)
        await asyncio.wait({status, self._full}, return_when=asyncio.FIRST_COMPLETED)
        got = self._got
        if not got:
            await asyncio.sleep(0.002)
            return await self._acks.oldest()
        self.arrived_s = time.perf_counter()
        for reply_to, _ in got[:-1]:
            self.wire.transport.write(b"PUB %b 4\r\n+ACK\r\n" % reply_to)
        acked = self.wire.request(got[-1][0], b"+ACK")
        return await self._acks.add(acked, [body for _, body in got])

    def close(self) -> None:
        self.wire.close()


class RedisStream(System):
    """XADD, XREADGROUP, XACK."""

    name = "Redis stream"
    needs = ("redis-server",)
    port = 26379

    async def start(self) -> None:
        self.run(["redis-server", "--port", str(self.port), "--bind", "127.0.0.1",
                  "--dir", str(self.root), "--appendonly", "yes", "--appendfsync", "always",
                  "--save", ""], "redis.log")  # fmt: skip
        await listening(self.port, self.processes[0])
        wire = await Resp.connect(self.port)
        for _ in range(6000):
            if not isinstance(await wire.command(b"XLEN", b"q"), bytes):
                break
            await asyncio.sleep(0.01)  # it loads what it has
        wire.close()

    async def fresh(self) -> None:
        wire = await Resp.connect(self.port)
        await wire.command(b"DEL", b"q")
        await wire.command(b"XGROUP", b"CREATE", b"q", b"g", b"0", b"MKSTREAM")
        wire.close()

    async def stored(self) -> int:
        wire = await Resp.connect(self.port)
        count = await wire.command(b"XLEN", b"q")
        wire.close()
        return int(count)

    async def connect(self) -> Session:
        return _RedisSession(await Resp.connect(self.port))


class _RedisSession(Session):
    def __init__(self, wire: Resp) -> None:
        self.wire = wire
        self.name = b"c%d" % id(self)
        self._acks = Acks()

    async def produce(self, body: bytes) -> None:
        await self.wire.command(b"XADD", b"q", b"*", b"b", body)

    async def produce_many(self, bodies: list[bytes]) -> None:
        await asyncio.gather(
            *self.wire.commands([(b"XADD", b"q", b"*", b"b", body) for body in bodies])
        )

    async def take(self, most: int, wait_s: float) -> list[bytes]:
        found = await self.wire.command(
            b"XREADGROUP", b"GROUP", b"g", self.name, b"COUNT", b"%d" % most,
            b"BLOCK", b"%d" % (1 if self._acks else int(wait_s * 1000)), b"STREAMS", b"q", b">",
        )  # fmt: skip
        if not found:
            return await self._acks.oldest()
        self.arrived_s = time.perf_counter()
        entries = found[0][1]
        acked = self.wire.command(b"XACK", b"q", b"g", *[entry[0] for entry in entries])
        return await self._acks.add(acked, [entry[1][1] for entry in entries])

    def close(self) -> None:
        self.wire.close()


class Beanstalkd(System):
    """put, reserve, delete."""

    name = "beanstalkd"
    needs = ("beanstalkd",)
    port = 21300

    async def start(self) -> None:
        self.run(["beanstalkd", "-l", "127.0.0.1", "-p", str(self.port), "-b", str(self.root),
                  "-f", "0", "-z", "70000"], "beanstalkd.log")  # fmt: skip
        await listening(self.port, self.processes[0])

    async def fresh(self) -> None:
        self.stop()
        for file in self.root.glob("binlog*"):
            file.unlink()
        await self.start()

    async def stored(self) -> int:
        wire = await Beanstalk.connect(self.port)
        text = (await wire.ask(b"stats-tube default\r\n"))[-1]
        wire.close()
        return int(text.split(b"current-jobs-ready: ")[1].split(b"\n")[0])

    async def connect(self) -> Session:
        return _BeanstalkSession(await Beanstalk.connect(self.port))


class _BeanstalkSession(Session):
    def __init__(self, wire: Beanstalk) -> None:
        self.wire = wire

    async def produce(self, body: bytes) -> None:
        answer = await self.wire.ask(b"put 0 0 120 %d\r\n%b\r\n" % (len(body), body))
        assert answer[0] == b"INSERTED", answer

    async def produce_many(self, bodies: list[bytes]) -> None:
        await asyncio.gather(*[self.produce(body) for body in bodies])

    async def take(self, most: int, wait_s: float) -> list[bytes]:
        if most == 1:
            wait = b"reserve-with-timeout %d\r\n" % max(1, int(wait_s))
            answers = [await self.wire.ask(wait)]
        else:
            now = b"reserve-with-timeout 0\r\n"
            answers = await asyncio.gather(*[self.wire.ask(now) for _ in range(most)])
        self.arrived_s = time.perf_counter()
        taken = [answer for answer in answers if answer[0] == b"RESERVED"]
        if not taken:
            await asyncio.sleep(0.002)
        await asyncio.gather(*[self.wire.ask(b"delete %b\r\n" % words[1]) for words in taken])
        return [words[-1] for words in taken]

    def close(self) -> None:
        self.wire.close()


PEERS: tuple[type[RabbitMQ | JetStream | RedisStream | Beanstalkd], ...] = (
    RabbitMQ, JetStream, RedisStream, Beanstalkd,
)  # fmt: skip


def family(pid: int) -> list[int]:
    """A process and its descendants (Linux)."""
    found = [pid]
    for parent in found:
        with suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found
