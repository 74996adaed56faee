"""Knock at ports of a host without the token: ``python knock.py ADDRESS PORT...``, from another host; prints JSON.

For each port that can be reached: which gRPC methods of Ray's were carried out, and which HTTP requests. A method
counts as carried out if its answer is anything but "unauthenticated" or "no such method here".
"""

from __future__ import annotations

import asyncio
import http.client
import importlib
import json
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import grpc
import ray
import ray.core.generated as generated

REFUSED = {"UNAUTHENTICATED", "UNIMPLEMENTED", "PERMISSION_DENIED"}
REQUESTS = [
    ("GET", "/"), ("GET", "/metrics"), ("GET", "/api/version"), ("GET", "/api/jobs/"), ("GET", "/nodes?view=summary"),
    ("GET", "/api/cluster_status"), ("GET", "/api/v0/nodes"), ("GET", "/logs/"), ("GET", "/api/job_agent/jobs/x/logs"),
    ("GET", "/api/local_raylet_healthz"), ("POST", "/api/jobs/"), ("POST", "/api/job_agent/jobs/"),
    ("POST", "/get_or_create_runtime_env"), ("POST", "/delete_runtime_env_if_possible"),
]  # fmt: skip


def methods() -> list[str]:
    """The full names of all methods of all services that this Ray has: in Python, and in its two servers."""
    found: set[str] = set()
    for module in pkgutil.iter_modules(generated.__path__):
        if module.name.endswith("_pb2"):
            file: Any = importlib.import_module(f"ray.core.generated.{module.name}").DESCRIPTOR
            for service in file.services_by_name.values():
                found |= {f"/{service.full_name}/{method.name}" for method in service.methods}
    for server in ("gcs/gcs_server", "raylet/raylet"):
        binary = Path(ray.__file__).with_name("core") / "src/ray" / server
        found |= {name.decode() for name in re.findall(rb"/ray\.rpc\.[\w.]*Service/\w+(?=\0)", binary.read_bytes())}
    return sorted(found)


async def reached(address: str, port: int) -> bool:
    """Whether a connection is taken."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), 10)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    return True


async def grpc_answers(address: str, port: int, names: list[str]) -> dict[str, str] | None:
    """What each method answers to an empty request without a token; None where nobody speaks gRPC."""
    answers: dict[str, str] = {}
    async with grpc.aio.insecure_channel(f"{address}:{port}") as channel:
        try:
            await asyncio.wait_for(channel.channel_ready(), 5)
        except asyncio.TimeoutError:
            return None

        async def call(name: str) -> None:
            try:
                await channel.unary_unary(name)(b"", timeout=20)
                answers[name] = "OK"
            except grpc.aio.AioRpcError as error:
                answers[name] = error.code().name

        await asyncio.gather(*map(call, names))
    return answers


def http_answers(address: str, port: int) -> dict[str, tuple[int, str]]:
    """The status of each request and the beginning of its answer; empty where nobody speaks HTTP."""
    answers = {}
    for verb, path in REQUESTS:
        connection = http.client.HTTPConnection(address, port, timeout=5)
        try:
            connection.request(verb, path, body=b"{}" if verb == "POST" else None)
            answer = connection.getresponse()
            answers[f"{verb} {path}"] = (answer.status, answer.read().decode(errors="replace")[:40])
        except (OSError, http.client.HTTPException):
            if not answers:
                return {}
        finally:
            connection.close()
    return answers


async def knock(address: str, port: int, names: list[str]) -> dict[str, Any]:
    spoken, asked = await asyncio.gather(
        grpc_answers(address, port, names), asyncio.to_thread(http_answers, address, port)
    )
    return {
        "grpc": {name: said for name, said in (spoken or {}).items() if said not in REFUSED},
        "grpc_refused": [name for name, said in (spoken or {}).items() if said == "UNAUTHENTICATED"],
        "http": {name: said for name, said in asked.items() if said[0] not in (401, 403)},
        "http_refused": sum(said[0] in (401, 403) for said in asked.values()),
    }


async def main(address: str, ports: list[int]) -> None:
    names = methods()
    there = await asyncio.gather(*(reached(address, port) for port in ports))
    ports = [port for port, is_there in zip(ports, there) if is_there]
    answers = await asyncio.gather(*(knock(address, port, names) for port in ports))
    print(json.dumps(dict(zip(ports, answers, strict=True))))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], [int(word) for word in sys.argv[2:]]))
