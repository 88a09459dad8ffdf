"""deploy/'s manifests, rendered and validated offline: by the tools for it, and by rules of our own (manifests.py).

Every rule and every tool is shown to refuse a manifest that is spoilt.
"""

import copy
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import ROOT
from manifests import RULES, Manifests, Object

DEPLOY = ROOT / "deploy"
TOOLS = ROOT / ".venv-kubernetes" / "bin"
MINIMAL, PRODUCTION, KSERVE = "kubernetes/overlays/minimal", "kubernetes/overlays/production", "kserve"
EVERY = (MINIMAL, PRODUCTION, KSERVE)
SCHEMAS = json.loads((ROOT / "tests" / "crd_schemas.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    done = subprocess.run([ROOT / "scripts" / "setup-kubernetes"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = f"scripts/setup-kubernetes failed: {done.stderr.strip()[-500:]}"
        pytest.fail(words) if os.environ.get("CI") == "true" else pytest.skip(words)


def tool(*command: object) -> "subprocess.CompletedProcess[str]":
    """Runs one of the tools; nothing of it may ask the network."""
    return subprocess.run(
        [str(part) for part in (TOOLS / str(command[0]), *command[1:])],
        env={**os.environ, "CHECKOV_RUN_SCA_PACKAGE_SCAN": "false"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.fixture(scope="module")
def rendered(tools: None) -> dict[str, list[Object]]:
    """The objects of every kustomization."""
    found = {}
    for name in EVERY:
        done = tool("kubectl", "kustomize", DEPLOY / name)
        # kustomize warns of what it will no longer take.
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        found[name] = list(yaml.safe_load_all(done.stdout))
    return found


def manifests(objects: list[Object]) -> Manifests:
    return Manifests(
        objects,
        (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8"),
        yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter.yaml").read_text(encoding="utf-8")),
    )


def test_every_kustomization_is_tested() -> None:
    found = {path.parent.relative_to(DEPLOY).as_posix() for path in DEPLOY.rglob("kustomization.yaml")}
    assert found == {*EVERY, "kubernetes/base"}


def test_what_they_hold(rendered: dict[str, list[Object]]) -> None:
    base = {"Namespace", "ServiceAccount", "Service", "PersistentVolumeClaim", "Deployment", "PodDisruptionBudget"}
    assert {value["kind"] for value in rendered[MINIMAL]} == base | {"NetworkPolicy"}
    more = {"NetworkPolicy", "HorizontalPodAutoscaler", "ServiceMonitor"}
    assert {value["kind"] for value in rendered[PRODUCTION]} == base | more
    assert {value["kind"] for value in rendered[KSERVE]} == {
        *("InferenceService", "ServingRuntime", "PodDisruptionBudget", "NetworkPolicy")
    }


# --- Rules of our own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", EVERY)
def test_our_own_rules(rendered: dict[str, list[Object]], name: str, rule: str) -> None:
    assert list(RULES[rule](manifests(rendered[name]))) == []


GONE = object()
POD = "spec.template.spec"
SERVER, VERIFY = f"{POD}.containers.0", f"{POD}.initContainers.0"
# Rule, overlay, kind and name of an object, the field that is spoilt, and what it is then (GONE: removed).
SPOILT: list[tuple[str, str, str, str, object]] = [
    ("restricted", MINIMAL, "Deployment/marble", f"{POD}.securityContext.runAsNonRoot", GONE),
    ("restricted", MINIMAL, "Deployment/marble", f"{POD}.securityContext.runAsUser", 1000),
    ("restricted", MINIMAL, "Deployment/marble", f"{POD}.securityContext.fsGroup", GONE),
    ("restricted", MINIMAL, "Deployment/marble", f"{POD}.securityContext.seccompProfile", {"type": "Unconfined"}),
    ("restricted", MINIMAL, "Deployment/marble", f"{POD}.hostNetwork", True),
    ("restricted", MINIMAL, "Deployment/marble", f"{SERVER}.securityContext.runAsNonRoot", GONE),
    ("restricted", MINIMAL, "Deployment/marble", f"{SERVER}.securityContext.runAsUser", 0),
    ("restricted", MINIMAL, "Deployment/marble", f"{SERVER}.securityContext.capabilities.add", ["NET_RAW"]),
    ("restricted", MINIMAL, "Deployment/marble", f"{SERVER}.securityContext.readOnlyRootFilesystem", False),
    ("restricted", MINIMAL, "Deployment/marble", f"{SERVER}.ports.0.hostPort", 8443),
    ("restricted", MINIMAL, "Deployment/marble", f"{VERIFY}.securityContext.allowPrivilegeEscalation", True),
    ("restricted", MINIMAL, "Deployment/marble", f"{POD}.volumes.0", {"name": "models", "hostPath": {"path": "/"}}),
    ("restricted", MINIMAL, "Namespace/marble", "metadata.labels", {}),
    ("restricted", KSERVE, "InferenceService/reviews", "spec.predictor.securityContext.runAsNonRoot", GONE),
    ("restricted", KSERVE, "ServingRuntime/marble", "spec.containers.0.securityContext.capabilities", GONE),
    ("no_access_to_the_api_server", MINIMAL, "ServiceAccount/marble", "automountServiceAccountToken", GONE),
    ("no_access_to_the_api_server", MINIMAL, "Deployment/marble", f"{POD}.automountServiceAccountToken", True),
    ("no_access_to_the_api_server", MINIMAL, "Deployment/marble", f"{POD}.enableServiceLinks", GONE),
    ("no_access_to_the_api_server", MINIMAL, "Deployment/marble", f"{POD}.serviceAccountName", "other"),
    ("probes", MINIMAL, "Deployment/marble", f"{SERVER}.readinessProbe.httpGet.path", "/ping"),
    ("probes", MINIMAL, "Deployment/marble", f"{SERVER}.readinessProbe.httpGet.port", "grpc"),
    ("probes", MINIMAL, "Deployment/marble", f"{SERVER}.readinessProbe.periodSeconds", 30),
    ("probes", MINIMAL, "Deployment/marble", f"{SERVER}.livenessProbe.httpGet.path", "/ready"),
    ("probes", MINIMAL, "Deployment/marble", f"{SERVER}.livenessProbe", GONE),
    ("probes", MINIMAL, "Deployment/marble", f"{SERVER}.startupProbe.httpGet.scheme", GONE),
    ("probes", MINIMAL, "Deployment/marble", f"{SERVER}.startupProbe.failureThreshold", 90),
    ("probes", KSERVE, "ServingRuntime/marble", "spec.containers.0.readinessProbe.httpGet.port", 8080),
    ("time_to_end", MINIMAL, "Deployment/marble", f"{SERVER}.lifecycle", GONE),
    ("time_to_end", MINIMAL, "Deployment/marble", f"{POD}.terminationGracePeriodSeconds", GONE),
    ("time_to_end", MINIMAL, "Deployment/marble", f"{POD}.terminationGracePeriodSeconds", 60),
    ("time_to_end", KSERVE, "InferenceService/reviews", "spec.predictor.terminationGracePeriodSeconds", 30),
    ("ports", MINIMAL, "Deployment/marble", f"{SERVER}.ports.0.containerPort", 8080),
    ("ports", MINIMAL, "Service/marble", "spec.ports.0.targetPort", "grpc"),
    ("ports", MINIMAL, "Service/marble", "spec.ports.1.port", 7070),
    ("ports", MINIMAL, "Service/marble", "spec.type", "LoadBalancer"),
    ("network", MINIMAL, "NetworkPolicy/marble", "spec.ingress.0.ports.0.port", 8081),
    ("network", MINIMAL, "NetworkPolicy/marble", "spec.ingress.0.ports.0.endPort", 9000),
    ("network", MINIMAL, "NetworkPolicy/marble", "spec.ingress.0.ports", GONE),
    ("network", MINIMAL, "NetworkPolicy/marble", "spec.ingress.0.from", GONE),
    ("network", MINIMAL, "NetworkPolicy/marble", "spec.ingress.0.from.0.namespaceSelector", {}),
    ("network", MINIMAL, "NetworkPolicy/marble", "spec.egress", [{}]),
    ("network", MINIMAL, "NetworkPolicy/nothing", "spec.policyTypes", ["Ingress"]),
    ("network", PRODUCTION, "NetworkPolicy/monitoring", "spec.ingress.0.ports.0.port", 8082),
    ("network", KSERVE, "NetworkPolicy/reviews", "spec.policyTypes", ["Ingress"]),
    ("selectors", MINIMAL, "Deployment/marble", "spec.selector.matchLabels", {"app": "marble"}),
    ("selectors", MINIMAL, "Service/marble", "spec.selector", {"app": "marble"}),
    ("selectors", MINIMAL, "PodDisruptionBudget/marble", "spec.selector.matchLabels", {"app": "marble"}),
    ("selectors", MINIMAL, "PodDisruptionBudget/marble", "spec.maxUnavailable", 0),
    ("selectors", MINIMAL, "NetworkPolicy/marble", "spec.podSelector.matchLabels", {"app": "marble"}),
    ("selectors", MINIMAL, "Service/marble", "metadata.namespace", "default"),
    ("selectors", PRODUCTION, "ServiceMonitor/marble", "spec.selector.matchLabels", {"app": "marble"}),
    ("selectors", PRODUCTION, "HorizontalPodAutoscaler/marble", "spec.scaleTargetRef.name", "other"),
    ("spread", MINIMAL, "Deployment/marble", f"{POD}.topologySpreadConstraints", GONE),
    ("spread", MINIMAL, "Deployment/marble", f"{POD}.topologySpreadConstraints.0.labelSelector", {}),
    ("spread", MINIMAL, "Deployment/marble", f"{POD}.topologySpreadConstraints.1.topologyKey", "rack"),
    ("spread", MINIMAL, "Deployment/marble", "spec.strategy.rollingUpdate.maxUnavailable", "25%"),
    ("references", MINIMAL, "Deployment/marble", f"{POD}.volumes.1.configMap.name", "marble-key"),
    ("references", MINIMAL, "Deployment/marble", f"{POD}.volumes.2.secret.secretName", "marble-cert"),
    ("references", MINIMAL, "PersistentVolumeClaim/marble-models", "metadata.name", "models"),
    ("references", PRODUCTION, "ServiceMonitor/marble", "spec.endpoints.0.authorization.credentials.name", "token"),
    ("references", KSERVE, "InferenceService/reviews", "spec.predictor.model.storageUri", "pvc://models/reviews"),
    ("volumes", MINIMAL, "Deployment/marble", f"{POD}.volumes.6", GONE),
    ("volumes", MINIMAL, "Deployment/marble", f"{POD}.volumes.6.emptyDir", {}),
    ("volumes", MINIMAL, "Deployment/marble", f"{POD}.volumes.6.emptyDir.sizeLimit", "40Gi"),
    ("volumes", MINIMAL, "Deployment/marble", f"{SERVER}.volumeMounts.3.readOnly", True),
    ("volumes", MINIMAL, "Deployment/marble", f"{SERVER}.volumeMounts.2.readOnly", False),
    ("volumes", MINIMAL, "Deployment/marble", f"{SERVER}.volumeMounts.4.mountPath", "/front"),
    ("volumes", KSERVE, "ServingRuntime/marble", "spec.containers.0.volumeMounts.4", GONE),
    ("arguments", MINIMAL, "Deployment/marble", f"{SERVER}.args.0", "--stores=/store"),
    ("arguments", MINIMAL, "Deployment/marble", f"{SERVER}.args.2", "--cert=/etc/tls/tls.crt"),
    ("arguments", MINIMAL, "Deployment/marble", f"{SERVER}.args.1", GONE),
    ("arguments", KSERVE, "ServingRuntime/marble", "spec.containers.0.args.0", "--store=/models"),
    ("verified", MINIMAL, "Deployment/marble", f"{POD}.initContainers", GONE),
    ("verified", MINIMAL, "Deployment/marble", f"{VERIFY}.args.6", "/etc/marble/other.pub"),
    ("verified", MINIMAL, "Deployment/marble", f"{VERIFY}.args.4", "/tmp"),
    ("verified", MINIMAL, "Deployment/marble", f"{VERIFY}.args.2", "/store"),
    ("verified", MINIMAL, "Deployment/marble", f"{VERIFY}.image", "other"),
    ("verified", MINIMAL, "Deployment/marble", f"{SERVER}.volumeMounts.0.readOnly", False),
    ("resources", MINIMAL, "Deployment/marble", f"{SERVER}.resources.limits", GONE),
    ("resources", MINIMAL, "Deployment/marble", f"{SERVER}.resources.limits.cpu", "2500m"),
    ("resources", MINIMAL, "Deployment/marble", f"{SERVER}.resources.requests.memory", "1Gi"),
    ("resources", MINIMAL, "Deployment/marble", f"{VERIFY}.resources.limits.ephemeral-storage", GONE),
    ("images", MINIMAL, "Deployment/marble", f"{SERVER}.image", "registry.example.org/marble:latest"),
    ("images", KSERVE, "ServingRuntime/marble", "spec.containers.0.image", "marble"),
    ("autoscaling", PRODUCTION, "HorizontalPodAutoscaler/marble", "spec.metrics.0.pods.metric.name", "queue"),
    ("autoscaling", PRODUCTION, "HorizontalPodAutoscaler/marble", "spec.minReplicas", 1),
    ("autoscaling", PRODUCTION, "HorizontalPodAutoscaler/marble", "spec.maxReplicas", 2),
    ("autoscaling", PRODUCTION, "Deployment/marble", "spec.replicas", 3),
    ("monitoring", PRODUCTION, "ServiceMonitor/marble", "spec.endpoints.0.port", "grpc"),
    ("monitoring", PRODUCTION, "ServiceMonitor/marble", "spec.endpoints.0.scheme", "http"),
    ("monitoring", PRODUCTION, "ServiceMonitor/marble", "spec.endpoints.0.authorization", GONE),
    ("monitoring", PRODUCTION, "ServiceMonitor/marble", "spec.endpoints.0.tlsConfig.insecureSkipVerify", True),
    ("monitoring", PRODUCTION, "ServiceMonitor/marble", "spec.endpoints.0.tlsConfig.serverName", "marble"),
    ("monitoring", PRODUCTION, "NetworkPolicy/monitoring", "spec.ingress", []),
    ("kserve", KSERVE, "ServingRuntime/marble", "spec.containers.0.name", "marble"),
    ("kserve", KSERVE, "ServingRuntime/marble", "spec.protocolVersions", ["v2"]),
    ("kserve", KSERVE, "ServingRuntime/marble", "spec.containers.0.ports.1.name", "grpc"),
    ("kserve", KSERVE, "InferenceService/reviews", "spec.predictor.model.modelFormat.name", "pytorch"),
    ("kserve", KSERVE, "InferenceService/reviews", "metadata.annotations", GONE),
    ("kserve", KSERVE, "InferenceService/reviews", "metadata.labels", GONE),
]


def spoil(objects: list[Object], which: str, path: str, value: object) -> list[Object]:
    """A copy of objects, a field of one of them changed."""
    changed = copy.deepcopy(objects)
    [at] = [entry for entry in changed if f"{entry['kind']}/{entry['metadata']['name']}" == which]
    *way, last = (int(part) if part.isdigit() else part for part in path.split("."))
    node: Any = at
    for part in way:
        node = node[part]
    if value is GONE:
        del node[last]
    else:
        node[last] = value
    assert changed != objects
    return changed


@pytest.mark.parametrize(
    ("rule", "name", "which", "path", "value"), SPOILT, ids=[f"{s[0]}-{s[2]}-{s[3]}-{i}" for i, s in enumerate(SPOILT)]
)
def test_a_rule_sees_what_breaks_it(
    rendered: dict[str, list[Object]], rule: str, name: str, which: str, path: str, value: object
) -> None:
    assert list(RULES[rule](manifests(spoil(rendered[name], which, path, value)))) != []


def test_every_rule_is_broken_once() -> None:
    assert {entry[0] for entry in SPOILT} == RULES.keys()


def test_a_metric_of_other_counters_is_seen(rendered: dict[str, list[Object]]) -> None:
    adapter = {"rules": [{"name": {"as": "marble_queue_seconds"}, "seriesQuery": "QueueTime{}", "metricsQuery": ""}]}
    [fault] = RULES["autoscaling"](Manifests(rendered[PRODUCTION], "", adapter))
    assert "QueueTime" in fault


def test_the_metric_is_the_time_that_a_request_waits(tmp_path: Path) -> None:
    """The adapter's query, asked of Prometheus itself: 0.1 s a request of one pod, and 0 where nobody asks."""
    if shutil.which("promtool") is None:
        words = "promtool is missing; on Debian: apt-get install prometheus"
        pytest.fail(words) if os.environ.get("CI") == "true" else pytest.skip(words)
    [rule] = manifests([]).adapter["rules"]
    query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'namespace="marble"')
    series = [
        {"series": f'{name}{{namespace="{namespace}",pod="{pod}",model_name="{model}"}}', "values": f"0+{step}x40"}
        for name, steps in (
            ("ts_queue_latency_microseconds", (3e5, 5e5, 0)),
            ("ts_inference_requests_total", (2, 6, 0)),
        )
        for (namespace, pod, model), step in zip(
            (("marble", "busy", "a"), ("marble", "busy", "b"), ("marble", "idle", "a")), steps, strict=True
        )
    ] + [{"series": 'ts_inference_requests_total{namespace="other",pod="foreign"}', "values": "0+9x40"}]
    expected = [{"labels": f'{{pod="{pod}"}}', "value": value} for pod, value in (("busy", 0.1), ("idle", 0))]
    test = {"expr": query, "eval_time": "5m", "exp_samples": expected}
    rules = {"tests": [{"interval": "15s", "input_series": series, "promql_expr_test": [test]}]}
    (tmp_path / "rules.test.yml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    done = subprocess.run(
        ["promtool", "test", "rules", "rules.test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- Tools -----------------------------------------------------------------------------------------------------------


def written(objects: list[Object], path: Path) -> Path:
    path.write_text(yaml.safe_dump_all(objects), encoding="utf-8")
    return path


def own_kinds(objects: list[Object]) -> list[Object]:
    """Those that kubernetes-validate knows."""
    return [value for value in objects if f"{value['apiVersion']}/{value['kind']}" not in SCHEMAS]


@pytest.mark.parametrize("name", EVERY)
def test_kubernetes_validate(rendered: dict[str, list[Object]], tmp_path: Path, name: str) -> None:
    objects = own_kinds(rendered[name])
    done = tool("kubernetes-validate", "--strict", written(objects, tmp_path / "all.yaml"))
    said = done.stdout + done.stderr
    assert (done.returncode, said.count(" passed for resource ")) == (0, len(objects)), said
    assert "WARN" not in said


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{SERVER}.readinessProbe.httpget", {}),
        (f"{POD}.terminationGracePeriodSeconds", "75"),
        ("spec.selector", GONE),
    ],
)
def test_kubernetes_validate_sees_mistakes(
    rendered: dict[str, list[Object]], tmp_path: Path, path: str, value: object
) -> None:
    objects = own_kinds(spoil(rendered[MINIMAL], "Deployment/marble", path, value))
    assert tool("kubernetes-validate", "--strict", written(objects, tmp_path / "all.yaml")).returncode != 0


def checkov(folder: Path, framework: str) -> list[str]:
    """The ids of the checks that failed."""
    done = tool("checkov", "-d", folder, "--framework", framework, "--skip-download", "--quiet", "--output", "json")
    result = json.loads(done.stdout)
    assert result["summary"]["passed"] > 50
    assert result["summary"]["parsing_errors"] == 0
    return sorted({check["check_id"] for check in result["results"]["failed_checks"]})


def test_checkov(rendered: dict[str, list[Object]], tmp_path: Path) -> None:
    """No check is left out. KServe's pods are put into a Deployment for it, as KServe will."""
    for name in (MINIMAL, PRODUCTION):
        written(rendered[name], tmp_path / f"{Path(name).name}.yaml")
    [deployment] = [value for value in rendered[MINIMAL] if value["kind"] == "Deployment"]
    [pod] = manifests(rendered[KSERVE]).pods
    as_kserve_does = copy.deepcopy(deployment)
    as_kserve_does["metadata"] |= {"name": "reviews-predictor", "labels": dict(pod.labels)}
    as_kserve_does["spec"]["template"] = {"metadata": {"labels": dict(pod.labels)}, "spec": pod.spec}
    written([*own_kinds(rendered[KSERVE]), as_kserve_does], tmp_path / "kserve.yaml")
    assert checkov(tmp_path, "kubernetes") == []


def test_checkov_sees_mistakes(rendered: dict[str, list[Object]], tmp_path: Path) -> None:
    objects = rendered[MINIMAL]
    for path, value in (
        (f"{SERVER}.securityContext.privileged", True),
        (f"{SERVER}.securityContext.capabilities", GONE),
        (f"{SERVER}.image", "marble:latest"),
        (f"{SERVER}.livenessProbe", GONE),
    ):
        objects = spoil(objects, "Deployment/marble", path, value)
    written(objects, tmp_path / "all.yaml")
    assert {"CKV_K8S_16", "CKV_K8S_28", "CKV_K8S_14", "CKV_K8S_43", "CKV_K8S_8"} <= set(checkov(tmp_path, "kubernetes"))


def test_checkov_on_the_containers_file(tmp_path: Path) -> None:
    # It goes by the name.
    shutil.copy(DEPLOY / "container" / "Containerfile", tmp_path / "Dockerfile")
    # "latest": it does not look into ARG BASE, which names a release of Debian.
    assert checkov(tmp_path, "dockerfile") == ["CKV_DOCKER_7"]
    text = (tmp_path / "Dockerfile").read_text()
    (tmp_path / "Dockerfile").write_text(text.replace("USER 10001:10001", "USER root"))
    assert "CKV_DOCKER_8" in checkov(tmp_path, "dockerfile")


def faults(value: Object) -> list[str]:
    schema = SCHEMAS[f"{value['apiVersion']}/{value['kind']}"]["schema"]
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(value)]


@pytest.mark.parametrize(
    ("name", "kind"), [(PRODUCTION, "ServiceMonitor"), (KSERVE, "ServingRuntime"), (KSERVE, "InferenceService")]
)
def test_schemas_of_other_projects(rendered: dict[str, list[Object]], name: str, kind: str) -> None:
    found = [value for value in rendered[name] if value["kind"] == kind]
    assert [faults(value) for value in found] == [[]]


@pytest.mark.parametrize(
    ("name", "which", "path", "value"),
    [
        (PRODUCTION, "ServiceMonitor/marble", "spec.endpoints.0.tlsconfig", {}),
        (PRODUCTION, "ServiceMonitor/marble", "spec.endpoints.0.interval", "15 s"),
        (PRODUCTION, "ServiceMonitor/marble", "spec.endpoints.0.scheme", "tls"),
        (PRODUCTION, "ServiceMonitor/marble", "spec.selector", GONE),
        (KSERVE, "ServingRuntime/marble", "spec.supportedModelFormats.0.autoselect", True),
        (KSERVE, "ServingRuntime/marble", "spec.containers", GONE),
        (KSERVE, "ServingRuntime/marble", "spec.containers.0.ports.0.containerPort", "rest"),
        (KSERVE, "InferenceService/reviews", "spec.predictor.minReplica", 2),
        (KSERVE, "InferenceService/reviews", "spec.predictor.minReplicas", "two"),
    ],
)
def test_schemas_of_other_projects_see_mistakes(
    rendered: dict[str, list[Object]], name: str, which: str, path: str, value: object
) -> None:
    [spoilt] = [
        entry
        for entry in spoil(rendered[name], which, path, value)
        if f"{entry['kind']}/{entry['metadata']['name']}" == which
    ]
    assert faults(spoilt) != []
