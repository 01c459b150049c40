"""compose, Kustomize, the values for production-stack's chart, Prometheus and Grafana: their schemas where a tool has
them, and what the parts must have in common."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.shipped import (
    DEPLOY,
    OVERLAYS,
    commands,
    compose,
    documents,
    flag,
    program,
    rendered,
    resources,
    seconds,
    tool,
    unit,
)

KUBERNETES = ("1.30", "1.34")

# --- compose ----------------------------------------------------------------------------------------------------------


def test_compose_keeps_to_the_specification(tmp_path: Path) -> None:
    path = DEPLOY / "compose" / "compose.yaml"
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)
    assert done.returncode == 0, done.stdout
    planted = tmp_path / "compose.yaml"
    planted.write_text(path.read_text(encoding="utf-8").replace("stop_grace_period", "stop_grace_perod"))
    assert tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", planted).returncode == 1


def test_compose_mounts_what_there_is() -> None:
    file = compose()
    here = DEPLOY / "compose"
    for service in file["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith(".."):
                where = (here / source).resolve()
                assert where.exists(), source
            elif not source.startswith("$"):
                assert source in file["volumes"]
    assert (here / file["services"]["server"]["build"]["context"]).resolve() == DEPLOY.parent
    assert (DEPLOY.parent / file["services"]["server"]["build"]["dockerfile"]).is_file()


def test_compose_publishes_nothing_beyond_this_machine_and_holds_no_password() -> None:
    for service in compose()["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for name, value in service.get("environment", {}).items():
            assert "PASSWORD" not in name or value.startswith("${"), name
    example = (DEPLOY / "compose" / ".env.example").read_text(encoding="utf-8")
    text = (DEPLOY / "compose" / "compose.yaml").read_text(encoding="utf-8")
    for name in ("MODEL", "MODELS", "KEY_FOLDER", "POSTGRES_PASSWORD", "GRAFANA_PASSWORD"):
        assert f"\n{name}=" in example
        assert f"${{{name}:" in text
    assert "PASSWORD=\n" in example


def test_prometheus_takes_its_configuration_and_scrapes_the_server() -> None:
    path = DEPLOY / "prometheus" / "prometheus.yml"
    promtool = program("promtool", remedy="run deploy/ci/install-services.sh as root")
    done = subprocess.run([promtool, "check", "config", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [config] = documents(path)
    targets = {each["job_name"]: each["static_configs"][0]["targets"] for each in config["scrape_configs"]}
    [port] = compose()["services"]["server"]["ports"]
    assert targets["deltamem"] == [f"server:{port.split(':')[-1]}"], "the job that the alert on a server looks at"
    assert list(path.parent.glob(config["rule_files"][0])), "no rules"


def test_grafana_finds_prometheus_and_its_dashboards() -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    [source] = documents(folder / "datasources" / "prometheus.yaml")
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    assert source["datasources"][0]["uid"] == "prometheus"
    [dashboards] = documents(folder / "dashboards" / "deltamem.yaml")
    place = dashboards["providers"][0]["options"]["path"]
    assert f"../grafana/dashboards:{place}:ro" in compose()["services"]["grafana"]["volumes"]


# --- Kubernetes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("version", KUBERNETES)
def test_overlays_are_valid(overlay: str, version: str, tmp_path: Path) -> None:
    path = tmp_path / "rendered.yaml"
    path.write_text(rendered(overlay))
    done = tool("kubernetes-validate", "--strict", "-k", version, path)
    assert done.returncode == 0, done.stdout + done.stderr
    unknown = [line for line in (done.stdout + done.stderr).splitlines() if "WARN" in line]
    assert len(unknown) == 1, unknown
    assert "ServiceMonitor" in unknown[0], "the only kind that is not Kubernetes' own"
    path.write_text(rendered(overlay).replace("terminationGracePeriodSeconds", "terminationGracePeriod"))
    assert tool("kubernetes-validate", "--strict", "-k", version, path).returncode != 0


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_parts_of_an_overlay_find_each_other(overlay: str) -> None:
    found = resources(overlay)
    deployment = found["Deployment", "deltamem"]
    pod = deployment["spec"]["template"]
    labels, [container] = pod["metadata"]["labels"], pod["spec"]["containers"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert found["Service", "deltamem"]["spec"]["selector"].items() <= labels.items()
    assert found["PodDisruptionBudget", "deltamem"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert found["NetworkPolicy", "deltamem"]["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    monitor = found["ServiceMonitor", "deltamem"]["spec"]
    service = found["Service", "deltamem"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert container["ports"] == [{"name": "http", "containerPort": 8000}]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    job = found["CronJob", "deltamem-backup"]["spec"]["jobTemplate"]["spec"]["template"]
    assert not deployment["spec"]["selector"]["matchLabels"].items() <= job["metadata"]["labels"].items()
    claims = {name for kind, name in found if kind == "PersistentVolumeClaim"} | {"deltamem-models"}
    for spec in (pod["spec"], job["spec"]):
        for volume in spec["volumes"]:
            claim = volume.get("persistentVolumeClaim")
            assert claim is None or claim["claimName"] in claims
        assert spec["securityContext"]["runAsNonRoot"] is True
        for each in spec["containers"]:
            assert each["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_one_file_has_one_server() -> None:
    found = resources("single")
    spec = found["Deployment", "deltamem"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    [store] = [e["value"] for e in spec["template"]["spec"]["containers"][0]["env"] if e["name"] == "DELTAMEM_STORE"]
    mounts = {m["name"]: m["mountPath"] for m in spec["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert store.startswith(f"sqlite:///{mounts['store']}/")
    job = found["CronJob", "deltamem-backup"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert store in job["containers"][0]["args"][0]
    [nearby] = job["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert nearby["labelSelector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()


def test_replicas_share_a_store_whose_password_is_in_a_secret() -> None:
    found = resources("replicas")
    spec = found["Deployment", "deltamem"]["spec"]
    assert spec["replicas"] > 1
    for container in (
        spec["template"]["spec"]["containers"][0],
        found["CronJob", "deltamem-backup"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0],
    ):
        assert all(e["valueFrom"]["secretKeyRef"]["name"] == "deltamem-postgres" for e in container["env"])
    assert found["Service", "deltamem"]["spec"]["sessionAffinity"] == "ClientIP"
    ports = [p["port"] for rule in found["NetworkPolicy", "deltamem"]["spec"]["egress"] for p in rule["ports"]]
    assert 5432 in ports


# --- ends -------------------------------------------------------------------------------------------------------------


def grace() -> dict[str, tuple[int, int]]:
    """What each deployment gives a server to end in, and how much of it passes before SIGTERM."""
    found = {"compose": (seconds(compose()["services"]["server"]["stop_grace_period"]), 0)}
    found["systemd"] = (seconds(unit("deltamem.service")["TimeoutStopSec"][0]), 0)
    found["production-stack"] = (30, 0)  # Kubernetes' own default: the chart has no value for it
    for overlay in OVERLAYS:
        pod = resources(overlay)["Deployment", "deltamem"]["spec"]["template"]["spec"]
        sleep, before = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert sleep == "sleep"
        found[f"kustomize {overlay}"] = (pod["terminationGracePeriodSeconds"], int(before))
    return found


@pytest.mark.parametrize("name", [*commands()])
def test_a_server_has_the_time_to_drain(name: str) -> None:
    allowed, before = grace()[name]
    drain = int(flag(commands()[name], "--shutdown-timeout"))
    assert drain > 0, "vLLM's default aborts what runs"
    assert before + drain + 5 <= allowed, "it would be killed before it has ended"


# --- production-stack and routing -------------------------------------------------------------------------------------

# Keys and types as the chart documents them (helm/values.yaml and values.schema.json of vllm-project/production-stack);
# the chart itself cannot be had as a package. A key that it does not know would be ignored in silence.
ROUTING = ("roundrobin", "session", "prefixaware", "kvaware", "disaggregated_prefill")
PROBE = {"initialDelaySeconds": int, "periodSeconds": int, "failureThreshold": int, "httpGet": dict}
CHART: dict[str, Any] = {
    "servingEngineSpec": {
        "enableEngine": bool,
        "vllmApiKey": {"secretName": str, "secretKey": str},
        "containerSecurityContext": {"runAsNonRoot": bool},
        "startupProbe": PROBE,
        "livenessProbe": PROBE,
        "modelSpec": [
            {
                "name": str,
                "repository": str,
                "tag": str,
                "modelURL": str,
                "replicaCount": int,
                "requestCPU": int,
                "requestMemory": str,
                "requestGPU": int,
                "vllmConfig": {"enablePrefixCaching": bool, "extraArgs": [str]},
                "env": [dict],
                "extraVolumes": [dict],
                "extraVolumeMounts": [dict],
            }
        ],
    },
    "routerSpec": {"enableRouter": bool, "replicaCount": int, "routingLogic": str, "sessionKey": str},
}


def misfits(value: Any, shape: Any, where: str = "values") -> list[str]:
    """Where values are not of the shape."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{where} is no object"]
        unknown = [f"{where}.{key} is not known" for key in value.keys() - shape.keys()]
        return unknown + [e for k in value.keys() & shape.keys() for e in misfits(value[k], shape[k], f"{where}.{k}")]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [e for i, each in enumerate(value) for e in misfits(each, shape[0], f"{where}[{i}]")]
    return [] if type(value) is shape else [f"{where} is {value!r}, no {shape.__name__}"]


def test_values_have_the_shape_of_the_chart() -> None:
    [values] = documents(DEPLOY / "production-stack" / "values.yaml")
    assert misfits(values, CHART) == []
    assert values["routerSpec"]["routingLogic"] in ROUTING
    assert (values["routerSpec"]["routingLogic"], values["routerSpec"]["sessionKey"]) == ("session", "x-session-id")
    [model] = values["servingEngineSpec"]["modelSpec"]
    assert not [e for e in model["env"] if "value" in e and "PASSWORD" in e["name"]]
    volumes, mounts = ({each["name"] for each in model[key]} for key in ("extraVolumes", "extraVolumeMounts"))
    assert volumes == mounts
    text = (DEPLOY / "production-stack" / "values.yaml").read_text(encoding="utf-8")
    assert misfits(yaml.safe_load(text.replace("sessionKey", "sessionkey")), CHART) == [
        "values.routerSpec.sessionkey is not known"
    ]


def test_llm_d_reads_the_session_header() -> None:
    [config] = documents(DEPLOY / "routing" / "llm-d.yaml")
    assert config["kind"] == "EndpointPickerConfig"
    plugins = {each["type"]: each.get("parameters", {}) for each in config["plugins"]}
    assert plugins["session-affinity-scorer"]["algorithm"] == "session_id_header"
    assert plugins["session-affinity-scorer"]["headerName"] == "x-session-id"
    [profile] = config["schedulingProfiles"]
    assert {each["pluginRef"] for each in profile["plugins"]} == plugins.keys()
