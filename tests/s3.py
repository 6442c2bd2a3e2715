"""An S3 server in a process of its own, reached over HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec


@contextmanager
def s3_server() -> Iterator[subprocess.Popen]:
    """Start a server with an empty bucket s3://bucket, and set the environment for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert server.poll() is None, "the S3 server does not start"
                assert time.monotonic() < deadline
                time.sleep(0.05)
        forget_connections()
        fsspec.filesystem("s3").mkdir("bucket")
        yield server
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        forget_connections()


def forget_connections() -> None:
    """Drop fsspec's file systems, which keep the settings with which they were made."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def objects(url: str) -> dict[str, bytes]:
    """Name below `url` -> content of every object."""
    system, root = fsspec.url_to_fs(url)
    system.invalidate_cache()
    return {path.removeprefix(f"{root}/"): system.cat_file(path) for path in system.find(root)}
