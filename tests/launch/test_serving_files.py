"""The container image of the server, compose.yaml and launch/kubernetes/serve.yaml."""

import json
import re
import tomllib
from importlib import resources
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from clvr_jax.cli import parse

ROOT = Path(__file__).parents[2]
DOCKERFILE, COMPOSE, KUBERNETES = (
    ROOT / "Dockerfile",
    ROOT / "compose.yaml",
    ROOT / "launch" / "kubernetes" / "serve.yaml",
)
KINDS = {"PersistentVolumeClaim", "Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
SETTINGS = {"CLVR_API_KEY", "CLVR_INDEX_URL"}


def entry_point():
    """The command of the image `serve`, without `clvr`."""
    stage = re.search(r"(?s)^FROM base AS serve$(.*?)^FROM ", DOCKERFILE.read_text(), re.MULTILINE)[1]
    return json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", stage, re.MULTILINE)[1])[1:], stage


@pytest.fixture
def manifests():
    found = {each["kind"]: each for each in yaml.safe_load_all(KUBERNETES.read_text())}
    assert found.keys() == KINDS
    return found


@pytest.fixture
def container(manifests):
    (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container


def test_the_image_serves_what_other_machines_reach_and_only_with_a_key(monkeypatch):
    command, stage = entry_point()
    serve = parse(command)
    assert (serve.host, serve.out, f"EXPOSE {serve.port}" in stage) == ("0.0.0.0", "/data", True)
    assert {serve.key_variable, serve.index_variable} == SETTINGS
    monkeypatch.delenv("CLVR_API_KEY", raising=False)
    with pytest.raises(Exception, match="set a key in CLVR_API_KEY"):
        serve.run()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "replicas" in extras
    assert ".[${JAX_EXTRA:+${JAX_EXTRA},}replicas]" in stage
    assert "\nUSER clvr\n" in stage
    assert f":{serve.port}/health" in stage


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_manifest_is_valid_for_kubernetes(manifests, kind):
    kubernetes_validate.validate(manifests[kind], kubernetes_validate.latest_version(), strict=True)


def test_the_schema_finds_a_wrong_field(manifests):
    manifests["Service"]["spec"]["selectr"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifests["Service"], kubernetes_validate.latest_version(), strict=True)


def test_the_manifests_belong_together(manifests, container):
    pods = manifests["Deployment"]["spec"]["template"]
    labels = pods["metadata"]["labels"]
    for selector in (
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["Service"]["spec"]["selector"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", manifests["Deployment"]["metadata"]["name"])
    serve = parse([*entry_point()[0], *container["args"]])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": serve.port}
    assert manifests["Service"]["spec"]["ports"][0]["targetPort"] in ports
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in pods["spec"]["volumes"]}
    claim = volumes[mounts[str(serve.out)]]["persistentVolumeClaim"]["claimName"]
    assert claim == manifests["PersistentVolumeClaim"]["metadata"]["name"]
    size = int(manifests["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"].removesuffix("Gi"))
    assert serve.limits.keep_gb < size
    # The grace is for running loops, and for a batch that cannot be interrupted.
    assert pods["spec"]["terminationGracePeriodSeconds"] >= serve.limits.drain_seconds + 60


def test_probes_ask_paths_without_a_key_and_scaling_follows_a_metric_that_there_is(manifests, container):
    from clvr_jax.serving.app import _OPEN_PATHS
    from clvr_jax.serving.scheduling.metrics import Metrics

    paths = [container[each]["httpGet"]["path"] for each in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert paths == ["/health", "/health", "/ready"]
    assert set(paths) <= set(_OPEN_PATHS)
    (metric,) = manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f"\n# TYPE {name} gauge\n" in Metrics().text().decode()
    # Pods are added before the queues are full.
    assert int(metric["pods"]["target"]["averageValue"]) < parse(["serve"]).limits.max_queue


def test_secrets_are_only_referred_to(manifests, container):
    assert {each["name"] for each in container["env"]} == SETTINGS
    assert all(each["valueFrom"]["secretKeyRef"]["name"] == "clvr-serve" for each in container["env"])
    keys = {each["valueFrom"]["secretKeyRef"]["key"] for each in container["env"]}
    assert keys == set(re.findall(r"--from-literal=([\w-]+)=", KUBERNETES.read_text()))


def test_the_compose_file_is_valid_and_its_services_have_volumes_and_health_checks():
    content = yaml.safe_load(COMPOSE.read_text())
    schema = json.loads(
        resources.files("check_jsonschema.builtin_schemas.vendor").joinpath("compose-spec.json").read_text()
    )
    jsonschema.Draft202012Validator(schema).validate(content)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate({**content, "services": {"a": {"imag": "b"}}})
    services = content["services"]
    assert services.keys() == {"server", "replica-a", "replica-b", "postgres"}
    assert "profiles" not in services["server"]
    assert all(services[name]["profiles"] == ["replicas"] for name in services if name != "server")
    serve = parse(entry_point()[0])
    for name, service in services.items():
        assert service["healthcheck"]["test"], name
        volume, _, path = service["volumes"][0].partition(":")
        assert volume in content["volumes"]
        if name != "postgres":
            assert path == str(serve.out)
            assert all(each.startswith("127.0.0.1:") and each.endswith(f":{serve.port}") for each in service["ports"])
            assert service["build"]["target"] == "serve"
            assert service["environment"].keys() <= SETTINGS
    replicas = [services["replica-a"], services["replica-b"]]
    assert {key: value for key, value in replicas[0].items() if key != "ports"} == {
        key: value for key, value in replicas[1].items() if key != "ports"
    }
    assert "CLVR_INDEX_URL" in replicas[0]["environment"]
    assert "CLVR_INDEX_URL" not in services["server"]["environment"]
    assert services["postgres"]["environment"]["POSTGRES_DB"] in replicas[0]["environment"]["CLVR_INDEX_URL"]
