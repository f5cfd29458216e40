"""The files of deploy/: what they copy exists, what they call the command line has, and linters find nothing."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

from cascadekit.cli import main
from cascadekit.storage.install_hint import ROOT

yaml = pytest.importorskip("yaml")
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
USER = 10001


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, each on one line."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def given(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def words(instruction: str) -> list[str]:
    """The words of the last instruction of that name, which has them as a JSON list."""
    found: list[str] = json.loads("[" + given(instruction)[-1].partition("[")[2])
    return found


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def container() -> Any:
    return documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]["containers"][0]


def parse(arguments: list[str]) -> dict[str, Any]:
    """The parameters of a command line of cascadekit, without running it."""
    command = main.get_command(click.Context(main), arguments[0])
    assert command is not None
    context = command.make_context(arguments[0], arguments[1:])
    return context.params


def test_what_is_copied_exists_and_makes_the_wheel() -> None:
    copied = {word for each in given("COPY") if "--from" not in each for word in each.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    packages = {name.split(".")[1] for name in PROJECT["tool"]["setuptools"]["packages"] if "." in name}
    licences = {name for name in PROJECT["project"]["license-files"] if "/" not in name}
    assert packages | licences | {PROJECT["project"]["readme"], "__init__.py", "__main__.py", "py.typed"} <= copied
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == copied


def test_extras_and_stages_exist() -> None:
    chosen = [set(group.split(",")) for each in given("RUN") for group in re.findall(r"whl\)\[(.*?)\]", each)]
    assert [{"cpu", "gpu"} & extras for extras in chosen] == [{"cpu"}, {"gpu"}]  # they share an import name
    assert set().union(*chosen) <= PROJECT["project"]["optional-dependencies"].keys()
    stages = {each.split()[-1] for each in given("FROM")}
    assert {source for each in given("COPY") for source in re.findall(r"--from=(\S+)", each)} <= stages
    assert documents("compose.yaml")[0]["services"]["cascadekit"]["build"]["target"] in stages


@pytest.mark.parametrize("arguments", [words("CMD"), container()["args"]], ids=["Dockerfile", "Kubernetes"])
def test_commands_are_those_of_the_command_line(arguments: list[str]) -> None:
    found = parse(arguments)
    assert (str(found["bundle"]), found["host"], found["port"]) == ("/bundle", "0.0.0.0", 8000)
    assert words("ENTRYPOINT")[-1].endswith("bin/cascadekit")
    assert "cascadekit" in PROJECT["project"]["scripts"]


def test_ports_paths_and_mounts_agree() -> None:
    pytest.importorskip("starlette")
    from cascadekit.runtime.serve.guard import OPEN

    pod, service = container(), documents("kubernetes.yaml")[1]
    compose = documents("compose.yaml")[0]["services"]["cascadekit"]
    assert given("EXPOSE") == ["8000"]
    assert compose["ports"] == ["127.0.0.1:8000:8000"]
    assert [port["containerPort"] for port in pod["ports"]] == [8000]
    assert service["spec"]["ports"][0]["targetPort"] == pod["ports"][0]["name"]
    probes = [pod[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert {(probe["path"], probe["port"]) for probe in probes} == {("/health", "http")}
    assert "/health" in OPEN  # probes have no key
    assert "http://127.0.0.1:8000/health" in words("HEALTHCHECK")[-1]
    assert pod["env"][0]["name"] in compose["environment"]
    assert pod["env"][0]["name"] == "CASCADEKIT_API_KEY"
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in pod["volumeMounts"]}
    assert mounts == {"/bundle": True, "/tmp": False}
    assert (compose["volumes"][0]["target"], compose["volumes"][0]["read_only"]) == ("/bundle", True)
    annotations = documents("kubernetes.yaml")[0]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == "8000"
    assert parse(pod["args"])["open_metrics"]  # such a scraper sends no key
    home = shlex.split(" ".join(given("ENV")))
    assert {"HOME=/tmp", "XDG_CACHE_HOME=/tmp/cache"} <= set(home)


def test_nobody_is_root_and_nothing_is_written() -> None:
    assert given("USER") == [f"{USER}:{USER}"]
    pod = documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsNonRoot"]) == (USER, True)
    secure = container()["securityContext"]
    assert secure["readOnlyRootFilesystem"] is True
    assert secure["allowPrivilegeEscalation"] is False
    assert secure["capabilities"] == {"drop": ["ALL"]}
    compose = documents("compose.yaml")[0]["services"]["cascadekit"]
    assert (compose["read_only"], compose["cap_drop"]) == (True, ["ALL"])
    assert pod["terminationGracePeriodSeconds"] > parse(container()["args"])["patience"]


def test_hadolint_finds_nothing() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint is not installed")
    found = subprocess.run([linter, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_kubernetes_knows_every_field(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for document in documents("kubernetes.yaml"):
        validate(document, version, strict=True)


def test_compose_knows_every_field() -> None:
    compose_spec = pytest.importorskip("compose_spec")
    text = (DEPLOY / "compose.yaml").read_text()
    plain = re.sub(r"\$\{\w+:\?[^}]*\}", "/given", text)  # variables are filled in before the file is read
    assert compose_spec.PyCompose.from_yaml(plain).service_names() == ["cascadekit"]
    with pytest.raises(Exception, match="read_onlyy"):
        compose_spec.PyCompose.from_yaml(plain.replace("read_only: true\n    tmpfs", "read_onlyy: true\n    tmpfs"))
