"""What must hold of deploy/'s manifests and no validator knows: one function for each rule, which yields what is wrong.

A pod of KServe's is put together from the ServingRuntime and the InferenceService, and must keep the same rules.
"""

import contextlib
import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from conftest import ROOT

from server import torchserve
from server.front import Settings
from server.options import serve as parse
from server.torchserve import Addresses, read_properties

Object = dict[str, Any]
FRONT = Settings.read(ROOT / "front.properties")
REST, GRPC = (int(address.rpartition(":")[2]) for address in (FRONT.rest, FRONT.grpc))
INNER = {port for _, port in Addresses.read(ROOT / "config.properties").ports()}
[USER] = re.findall(r"(?m)^USER (\d+):", (ROOT / "deploy" / "container" / "Containerfile").read_text())
# Where the server writes; everything else of its container may be read-only.
WRITTEN = ("/tmp", "/var/lib/marble")
# From TERM to the end: nginx's drain with what Front.drain adds, and TorchServe's own end.
SECONDS_TO_END = FRONT.drain_seconds + 5 + torchserve._SECONDS_TO_STOP
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "m": 1e-3, "": 1}


@dataclass(frozen=True)
class Pod:
    """name: of what makes the pod. template: its labels and its spec."""

    name: str
    labels: Mapping[str, str]
    spec: Object

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def server(self) -> Object:
        [container] = self.spec["containers"]
        return dict(container)

    def volume(self, container: Object, path: str) -> tuple[Object, Object]:
        """The mount and the volume that hold a path; empty ones if it is in the image."""
        mounts = [m for m in container.get("volumeMounts", []) if Path(path).is_relative_to(m["mountPath"])]
        if not mounts:
            return {}, {}
        mount = max(mounts, key=lambda m: len(m["mountPath"]))
        return mount, next((v for v in self.spec.get("volumes", []) if v["name"] == mount["name"]), {})


@dataclass(frozen=True)
class Manifests:
    """objects: of one kustomization. documented: the text of docs/kubernetes.md. adapter: prometheus-adapter.yaml."""

    objects: list[Object]
    documented: str
    adapter: Object = field(default_factory=dict)

    def of(self, kind: str) -> list[Object]:
        return [value for value in self.objects if value["kind"] == kind]

    @cached_property
    def pods(self) -> list[Pod]:
        found = [
            Pod(
                value["metadata"]["name"],
                value["spec"]["template"]["metadata"]["labels"],
                value["spec"]["template"]["spec"],
            )
            for value in self.of("Deployment")
        ]
        for service in self.of("InferenceService"):
            predictor = service["spec"]["predictor"]
            [runtime] = [r for r in self.of("ServingRuntime") if r["metadata"]["name"] == predictor["model"]["runtime"]]
            # As KServe does; it mounts a volume claim at /mnt/models.
            claim = re.fullmatch(r"pvc://([^/]+)/.+", predictor["model"]["storageUri"])
            assert claim is not None
            spec = {key: value for key, value in predictor.items() if key != "model"} | {
                key: list(runtime["spec"].get(key, [])) for key in ("containers", "volumes")
            }
            spec["volumes"].append(
                {"name": "kserve", "persistentVolumeClaim": {"claimName": claim[1], "readOnly": True}}
            )
            mount = {"name": "kserve", "mountPath": "/mnt/models", "readOnly": True}
            first = spec["containers"][0]
            spec["containers"][0] = {**first, "volumeMounts": [*first.get("volumeMounts", []), mount]}
            name = service["metadata"]["name"]
            found.append(Pod(name, {"serving.kserve.io/inferenceservice": name}, spec))
        return found

    def selected_by(self, selector: Object) -> list[Pod]:
        return [pod for pod in self.pods if selects(selector, pod.labels)]


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Of a selector with matchLabels alone; an empty one selects everything."""
    assert selector.keys() <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def amount(text: object) -> float:
    """A quantity: 4Gi, 500m, 2."""
    match = re.fullmatch(r"([0-9.]+)(Ki|Mi|Gi|m|)", str(text))
    assert match is not None, text
    return float(match[1]) * UNITS[match[2]]


def options(container: Object) -> dict[str, str]:
    """--name=value and --name value of its arguments."""
    words = [word for argument in container.get("args", []) for word in str(argument).split("=", 1)]
    return {name: value for name, value in itertools.pairwise(words) if name.startswith("--")}


def restricted(manifests: Manifests) -> Iterator[str]:
    """Pod security of the level `restricted`, the container's own user, and a root that nothing writes to."""
    for pod in manifests.pods:
        context = pod.spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True:
            yield f"{pod.name}: runAsNonRoot"
        if {str(context.get(key)) for key in ("runAsUser", "runAsGroup", "fsGroup")} != {USER}:
            yield f"{pod.name}: another user than the Containerfile's"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pod.name}: seccomp"
        if any(pod.spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{pod.name}: a namespace of the host"
        for container in pod.containers:
            own = container.get("securityContext", {})
            wanted = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }
            for key, value in wanted.items():
                if own.get(key) != value:
                    yield f"{pod.name}/{container['name']}: {key}"
            if own.get("privileged") or {"runAsUser", "procMount"} & own.keys():
                yield f"{pod.name}/{container['name']}: more rights than the pod"
            if any("hostPort" in port for port in container.get("ports", [])):
                yield f"{pod.name}/{container['name']}: a port of the host"
        allowed = {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}
        for volume in pod.spec["volumes"]:
            if not volume.keys() - {"name"} <= allowed:
                yield f"{pod.name}: volume {volume['name']}"
    for namespace in manifests.of("Namespace"):
        if namespace["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            yield "the namespace does not enforce it"


def no_access_to_the_api_server(manifests: Manifests) -> Iterator[str]:
    for owner in (*manifests.of("ServiceAccount"), *(pod.spec for pod in manifests.pods)):
        if owner.get("automountServiceAccountToken") is not False:
            yield "a token of a service account is mounted"
    for pod in manifests.pods:
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.name}: variables of Services"
        name = pod.spec.get("serviceAccountName")
        if name and name not in [account["metadata"]["name"] for account in manifests.of("ServiceAccount")]:
            yield f"{pod.name}: no such service account"


def probes(manifests: Manifests) -> Iterator[str]:
    for pod in manifests.pods:
        server = pod.server
        ports = {port["name"]: port["containerPort"] for port in server["ports"]}
        for probe, path in (("startupProbe", "/ready"), ("readinessProbe", "/ready"), ("livenessProbe", "/live")):
            get = server.get(probe, {}).get("httpGet", {})
            if (get.get("path"), get.get("scheme"), ports.get(get.get("port"), get.get("port"))) != (
                path,
                "HTTPS",
                REST,
            ):
                yield f"{pod.name}: {probe}"
        start = server.get("startupProbe", {})
        if start.get("periodSeconds", 10) * start.get("failureThreshold", 3) < parse(server["args"]).timeout + 30:
            yield f"{pod.name}: it is killed before it gives up by itself"
        if server.get("readinessProbe", {}).get("periodSeconds", 10) > 5:
            yield f"{pod.name}: readiness is old news"


def time_to_end(manifests: Manifests) -> Iterator[str]:
    for pod in manifests.pods:
        pause = pod.server.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if pause < 3:
            yield f"{pod.name}: TERM comes before load balancers know"
        if pod.spec.get("terminationGracePeriodSeconds", 30) < pause + SECONDS_TO_END + 5:
            yield f"{pod.name}: it is killed while it drains"


def ports(manifests: Manifests) -> Iterator[str]:
    """Those of front.properties, the same everywhere."""
    for pod in manifests.pods:
        numbers = [port["containerPort"] for port in pod.server["ports"]]
        if numbers != [REST, GRPC]:
            yield f"{pod.name}: ports {numbers}"
    for service in manifests.of("Service"):
        for pod in manifests.selected_by({"matchLabels": service["spec"]["selector"]}):
            names = {port["name"]: port["containerPort"] for port in pod.server["ports"]}
            for port in service["spec"]["ports"]:
                if names.get(port["targetPort"], port["targetPort"]) != port["port"]:
                    yield f"Service {service['metadata']['name']}: {port['name']} leads elsewhere"
        if sorted(port["port"] for port in service["spec"]["ports"]) != [REST, GRPC]:
            yield f"Service {service['metadata']['name']}: other ports"
        if service["spec"].get("type", "ClusterIP") != "ClusterIP":
            yield f"Service {service['metadata']['name']}: open beyond the cluster"


def network(manifests: Manifests) -> Iterator[str]:
    """Nothing goes out, and what comes in reaches the front door alone."""
    for pod in manifests.pods:
        policies = [p["spec"] for p in manifests.of("NetworkPolicy") if selects(p["spec"]["podSelector"], pod.labels)]
        for direction in ("Ingress", "Egress"):
            if not any(direction in policy["policyTypes"] for policy in policies):
                yield f"{pod.name}: no policy for {direction}"
        if any(policy.get("egress") for policy in policies):
            yield f"{pod.name}: something may go out"
        rules = [rule for policy in policies for rule in policy.get("ingress", [])]
        allowed = {port.get("port") for rule in rules for port in rule.get("ports", [{}])}
        if allowed != {REST, GRPC}:
            yield f"{pod.name}: {allowed} may be reached, {REST} and {GRPC} should"
        if allowed & INNER or any("endPort" in port for rule in rules for port in rule.get("ports", [])):
            yield f"{pod.name}: TorchServe's own ports may be reached"
        for rule in rules:
            sources = rule.get("from", [{}])
            if not sources or any(not source.get("namespaceSelector", {}).get("matchLabels") for source in sources):
                yield f"{pod.name}: anybody may reach it"
    if manifests.of("Namespace") and not any(
        p["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} for p in manifests.of("NetworkPolicy")
    ):
        yield "other pods of the namespace are open"


def selectors(manifests: Manifests) -> Iterator[str]:
    """Whoever selects or names something finds it."""
    for deployment in manifests.of("Deployment"):
        if not selects(deployment["spec"]["selector"], deployment["spec"]["template"]["metadata"]["labels"]):
            yield "the Deployment does not select its own pods"
    for kind, get in (
        ("Service", lambda spec: {"matchLabels": spec["selector"]}),
        ("PodDisruptionBudget", lambda spec: spec["selector"]),
        ("NetworkPolicy", lambda spec: spec["podSelector"]),
    ):
        for value in manifests.of(kind):
            if not manifests.selected_by(get(value["spec"])):  # type: ignore[no-untyped-call]
                yield f"{kind} {value['metadata']['name']} selects nothing"
    for monitor in manifests.of("ServiceMonitor"):
        if not any(
            selects(monitor["spec"]["selector"], s["metadata"].get("labels", {})) for s in manifests.of("Service")
        ):
            yield "the ServiceMonitor selects nothing"
    for scaler in manifests.of("HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        if target["name"] not in [value["metadata"]["name"] for value in manifests.of(target["kind"])]:
            yield "the autoscaler scales nothing"
    for pod in manifests.pods:
        budgets = [b for b in manifests.of("PodDisruptionBudget") if selects(b["spec"]["selector"], pod.labels)]
        if [budget["spec"].get("maxUnavailable") for budget in budgets] != [1]:
            yield f"{pod.name}: not one budget, of one pod"
    if {value["metadata"].get("namespace", "marble") for value in manifests.objects} != {"marble"}:
        yield "another namespace"


def spread(manifests: Manifests) -> Iterator[str]:
    for pod in manifests.pods:
        constraints = {c["topologyKey"]: c for c in pod.spec.get("topologySpreadConstraints", [])}
        if constraints.keys() != {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}:
            yield f"{pod.name}: spread over {sorted(constraints)}"
        if any(
            not selects(c.get("labelSelector", {}), pod.labels) or not c.get("labelSelector")
            for c in constraints.values()
        ):
            yield f"{pod.name}: the spread counts other pods"
    for deployment in manifests.of("Deployment"):
        if deployment["spec"].get("strategy", {}).get("rollingUpdate", {}).get("maxUnavailable") != 0:
            yield "an old server goes before a new one is ready"


def references(manifests: Manifests) -> Iterator[str]:
    """Every object that is named is here, or docs/kubernetes.md says how to make it."""
    named = set()
    for pod in manifests.pods:
        for volume in pod.spec["volumes"]:
            named |= {("configmap", volume[key]["name"]) for key in ("configMap",) if key in volume}
            named |= {("secret", volume[key]["secretName"]) for key in ("secret",) if key in volume}
            if "persistentVolumeClaim" in volume:
                named.add(("persistentvolumeclaim", volume["persistentVolumeClaim"]["claimName"]))
    for monitor in manifests.of("ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            named.add(("secret", endpoint.get("authorization", {}).get("credentials", {}).get("name")))
            named.add(("secret", endpoint.get("tlsConfig", {}).get("ca", {}).get("secret", {}).get("name")))
    here = {(value["kind"].lower(), value["metadata"]["name"]) for value in manifests.objects}
    for kind, name in named - here:
        if not re.search(rf"(?m)^kubectl .*create {kind}\b.* {name} ", manifests.documented) and (
            kind != "persistentvolumeclaim"
            or manifests.of("Deployment")
            or not re.search(rf"claim `{name}`", manifests.documented)
        ):
            yield f"{kind} {name} is neither here nor documented"


def volumes(manifests: Manifests) -> Iterator[str]:
    """What is mounted is there, what is there is mounted; the server writes to sized volumes of its own alone."""
    for pod in manifests.pods:
        names = {volume["name"] for volume in pod.spec["volumes"]}
        mounted = {mount["name"] for container in pod.containers for mount in container["volumeMounts"]}
        if names != mounted:
            yield f"{pod.name}: volumes {sorted(names ^ mounted)}"
        sizes = [v["emptyDir"].get("sizeLimit") for v in pod.spec["volumes"] if "emptyDir" in v]
        if None in sizes:
            yield f"{pod.name}: a volume without a size"
        elif sum(map(amount, sizes)) > amount(pod.server["resources"]["limits"]["ephemeral-storage"]):
            yield f"{pod.name}: it is evicted before its volumes are full"
        for path in WRITTEN:
            mount, volume = pod.volume(pod.server, path)
            if "emptyDir" not in volume or mount.get("readOnly"):
                yield f"{pod.name}: cannot write to {path}"
        for container in pod.containers:
            for mount in container["volumeMounts"]:
                if "emptyDir" not in pod.volume(container, mount["mountPath"])[1] and not mount.get("readOnly"):
                    yield f"{pod.name}/{container['name']}: may write to {mount['name']}"
        if "secret" not in pod.volume(pod.server, "/var/lib/marble/front/tokens.json")[1]:
            yield f"{pod.name}: no tokens"


def arguments(manifests: Manifests) -> Iterator[str]:
    """scripts/serve takes the server's arguments; files that they name are mounted."""
    for pod in manifests.pods:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                parse(pod.server["args"])
        except SystemExit:
            yield f"{pod.name}: {said.getvalue().strip().splitlines()[-1]}"
        for container in pod.containers:
            for option, value in options(container).items():
                if value.startswith("/") and not pod.volume(container, value)[1]:
                    yield f"{pod.name}/{container['name']}: {option} {value} is not mounted"
        given = options(pod.server)
        for option in ("--store", "--trust", "--cert", "--key"):
            if option not in given:
                yield f"{pod.name}: no {option}"


def verified(manifests: Manifests) -> Iterator[str]:
    """The server gets archives that its init container has verified (KServe fills the folder by itself)."""
    for pod in manifests.pods:
        mount, volume = pod.volume(pod.server, options(pod.server).get("--store", ""))
        if not mount.get("readOnly"):
            yield f"{pod.name}: it can change its archives"
        if "persistentVolumeClaim" in volume and manifests.of("InferenceService"):
            continue
        checks = [c for c in pod.spec.get("initContainers", []) if c.get("args", [None])[0] == "verify"]
        if not checks:
            yield f"{pod.name}: nothing verifies"
        for container in checks:
            given = options(container)
            if given.get("--trust") != options(pod.server).get("--trust"):
                yield f"{pod.name}: another key, or none"
            if pod.volume(container, given.get("--into", ""))[1] != volume or container["image"] != pod.server["image"]:
                yield f"{pod.name}: what is verified is not what is served"
            if "persistentVolumeClaim" not in pod.volume(container, given.get("--store", ""))[1]:
                yield f"{pod.name}: what is verified comes from nowhere"


def resources(manifests: Manifests) -> Iterator[str]:
    for pod in manifests.pods:
        for container in pod.containers:
            asked, limits = (container.get("resources", {}).get(key, {}) for key in ("requests", "limits"))
            if not {"cpu", "memory", "ephemeral-storage"} <= asked.keys() & limits.keys():
                yield f"{pod.name}/{container['name']}: not all resources"
            elif asked["memory"] != limits["memory"]:
                yield f"{pod.name}/{container['name']}: memory that it may lose"
        asked, limits = (pod.server.get("resources", {}).get(key, {}).get("cpu", 0) for key in ("requests", "limits"))
        if asked != limits or amount(asked) % 1:
            yield f"{pod.name}: threads for cores that it does not have"


def images(manifests: Manifests) -> Iterator[str]:
    for pod in manifests.pods:
        for container in pod.containers:
            if not re.fullmatch(r"[a-z0-9.-]+\.[a-z]+/[a-z0-9/_-]+@sha256:[0-9a-f]{64}", container["image"]):
                yield f"{pod.name}/{container['name']}: {container['image']} is not named by digest"


def autoscaling(manifests: Manifests) -> Iterator[str]:
    """By a metric that the adapter makes, of counters that TorchServe has."""
    known = yaml.safe_load((ROOT / "deploy" / "metrics.yaml").read_text(encoding="utf-8"))["ts_metrics"]
    counters = {entry["name"] for entry in known["counter"]}
    rules = {rule["name"]["as"]: rule for rule in manifests.adapter.get("rules", [])}
    for scaler in manifests.of("HorizontalPodAutoscaler"):
        spec = scaler["spec"]
        for metric in spec["metrics"]:
            name = metric.get("pods", {}).get("metric", {}).get("name")
            if name not in rules:
                yield f"nobody makes the metric {name}"
                continue
            query = rules[name]["seriesQuery"] + rules[name]["metricsQuery"]
            used = set(re.findall(r"\b(\w+)\{", query))
            if used != {"ts_queue_latency_microseconds", "ts_inference_requests_total"} or not used <= counters:
                yield f"{name} is made of {sorted(used)}"
        if not 2 <= spec["minReplicas"] < spec["maxReplicas"]:
            yield "it has no room"
        for deployment in manifests.of(spec["scaleTargetRef"]["kind"]):
            if "replicas" in deployment["spec"]:
                yield "two decide on the number of replicas"
    if read_properties(ROOT / "config.properties").get("metrics_mode") != "prometheus":
        yield "the server has no metrics"


def monitoring(manifests: Manifests) -> Iterator[str]:
    for monitor in manifests.of("ServiceMonitor"):
        [service] = [
            s for s in manifests.of("Service") if selects(monitor["spec"]["selector"], s["metadata"].get("labels", {}))
        ] or [{"metadata": {"name": "none"}, "spec": {"ports": []}}]
        names = {port["name"]: port["port"] for port in service["spec"]["ports"]}
        for endpoint in monitor["spec"]["endpoints"]:
            if (endpoint.get("scheme"), endpoint.get("path"), names.get(endpoint.get("port"))) != (
                "https",
                "/metrics",
                REST,
            ):
                yield "it asks elsewhere"
            tls = endpoint.get("tlsConfig", {})
            if tls.get("insecureSkipVerify") or tls.get("serverName") != f"{service['metadata']['name']}.marble.svc":
                yield "it does not know whom it asks"
            if not endpoint.get("authorization", {}).get("credentials"):
                yield "it has no token"
        if not any(
            "monitoring" in str(rule.get("from")) and [port["port"] for port in rule["ports"]] == [REST]
            for policy in manifests.of("NetworkPolicy")
            for rule in policy["spec"].get("ingress", [])
        ):
            yield "no policy lets it in"


def kserve(manifests: Manifests) -> Iterator[str]:
    for runtime in manifests.of("ServingRuntime"):
        spec = runtime["spec"]
        if spec["containers"][0]["name"] != "kserve-container":
            yield "KServe does not find the server"
        if set(spec.get("protocolVersions", [])) != {"v1", "v2", "grpc-v2"}:
            yield "not all protocols that the front door lets through"
        if any(re.search("grpc|h2c", port["name"]) for port in spec["containers"][0]["ports"]):
            yield "KServe takes a port for HTTP/2 without TLS"
        for service in manifests.of("InferenceService"):
            wanted = service["spec"]["predictor"]["model"]["modelFormat"]
            if not any(wanted.items() <= own.items() for own in spec["supportedModelFormats"]):
                yield "the runtime does not take the model"
            annotations = service["metadata"].get("annotations", {})
            if annotations.get("serving.kserve.io/deploymentMode") != "Standard":
                yield "another mode than the standard one"
            if service["metadata"].get("labels", {}).get("networking.kserve.io/visibility") != "cluster-local":
                yield "an ingress that speaks plain HTTP to it"


RULES: dict[str, Callable[[Manifests], Iterator[str]]] = {
    rule.__name__: rule
    for rule in (
        *(restricted, no_access_to_the_api_server, probes, time_to_end, ports, network, selectors, spread, references),
        *(volumes, arguments, verified, resources, images, autoscaling, monitoring, kserve),
    )
}
