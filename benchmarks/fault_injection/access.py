"""Row 11: every route and method, with every kind of token, at both ports."""

import http.client
import json
import ssl
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import FileDescriptor

from benchmarks.fault_injection.bench import MODEL, Bench, Target
from benchmarks.fault_injection.site import BODY, MODEL_INFER, PREDICTIONS, Site, message
from marble_client.stubs import inference_pb2, management_pb2, open_inference_grpc_pb2
from server import tokens

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
V2 = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a fine film"]}]}
_JSON = {"Content-Type": "application/json"}
# TorchServe's own words for "explain" and "describe"; the door must take them off.
_ORDERS = {"explain": "True", "describe": "True"}
_PROBES = ("/live", "/ready")
# Slower than the door's limit of probes, which is not what is tested here.
_SECONDS_BETWEEN_PROBES = 0.06


@dataclass(frozen=True)
class Route:
    """What the door serves. role: "" where no token is needed. good: the status of those who may.

    keys: those of the body of an error; TorchServe's own errors keep their form behind the door.
    """

    method: str
    path: str
    body: object
    role: str
    good: int = 200
    keys: frozenset[str] = frozenset({"error", "code", "type"})


_OF_TORCHSERVE = frozenset({"message", "code", "type"})
SERVED = (
    Route("POST", f"/predictions/{MODEL}", BODY, "predict"),
    Route("POST", f"/predictions/{MODEL}/1.0", BODY, "predict"),
    Route("POST", f"/v1/models/{MODEL}:predict", {"instances": ["a fine film"]}, "predict"),
    Route("POST", f"/v2/models/{MODEL}/infer", V2, "predict"),
    Route("POST", f"/v2/models/{MODEL}/versions/1.0/infer", V2, "predict"),
    Route("POST", f"/explanations/{MODEL}", BODY, "explain"),
    Route("POST", f"/explanations/{MODEL}/1.0", BODY, "explain"),
    Route("GET", "/metrics", None, "metrics"),
    Route("GET", "/status", None, "admin"),
    Route("POST", "/predictions/nobody", BODY, "predict", 404),
    Route("POST", f"/predictions/{MODEL}/7", BODY, "predict", 404, _OF_TORCHSERVE),
    Route("POST", f"/v2/models/{MODEL}/versions/7/infer", V2, "predict", 404, _OF_TORCHSERVE),
    Route("POST", "/v1/models/nobody:predict", {"instances": ["x"]}, "predict", 404),
    Route("POST", "/v2/models/nobody/infer", V2, "predict", 404),
    Route("POST", "/explanations/nobody", BODY, "explain", 404),
)
# TorchServe's own routes, those of KServe that say yes whatever is the matter, and spellings that hide one.
NOT_SERVED = (
    *("/", "/ping", "/api-description", "/models", f"/models/{MODEL}", f"/models/{MODEL}/1.0", f"/models/{MODEL}/all"),
    *(f"/models/{MODEL}?min_worker=0", f"/models/{MODEL}/1.0/set-default", "/models?url=x.mar", "/models;x"),
    *("/token", "/token?type=inference", "/token?type=management", "/workflows", f"/wfpredict/{MODEL}"),
    *("/v1/models", f"/v1/models/{MODEL}", f"/v1/models/{MODEL}:explain", "/v1", "/v2", "/v2/", "/v2/models"),
    *(f"/v2/models/{MODEL}", f"/v2/models/{MODEL}/ready", f"/v2/models/{MODEL}/infer/x", f"/v2/models/{MODEL}/stats"),
    *("/v2/health/ready", "/v2/health/live", f"/v2/repository/models/{MODEL}/unload", "/v2/repository/index"),
    *("/predictions", "/predictions/", f"/predictions/{MODEL}/", f"/predictions/{MODEL}/1.0/some/path"),
    *(f"/predictions/{MODEL}/../../models", f"/predictions/{MODEL}/..%2f..%2fmodels", f"//predictions/{MODEL}"),
    *(f"/predictions/%2e%2e/models/{MODEL}", f"/predictions/{MODEL}%00", f"/predictions/{MODEL};x=y"),
    *(f"/explanations/{MODEL}/1.0/x", "//metrics", "/metrics/", "/metrics/x", "/METRICS", "/Status", "/status/"),
    *("/health", "/healthz", "/stub_status", "/nginx_status", "/.errors/400", "/favicon.ico", "/run/front.json"),
    *("/front/tokens.json", "/key_file.json", "/../key_file.json", "/%2e%2e/key_file.json", "/.git/config"),
    *(PREDICTIONS, MODEL_INFER, "/org.pytorch.serve.grpc.management.ManagementAPIsService/ListModels"),
)
# Methods of gRPC that other servers have, and that must not be here either.
_FOREIGN = (
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/inference.GRPCInferenceService/ModelInfer",
    f"{PREDICTIONS}/",
    f"/{PREDICTIONS}",
    PREDICTIONS.lower(),
    PREDICTIONS.replace("Predictions", "Predictions2"),
)


def every_route(bench: Bench) -> tuple[list[Target], Any]:
    """Row 11: what each answers is compared with docs/front-door.md, case by case."""
    with bench.site("access") as site:
        kinds = headers_of(site)
        cases: Counter[str] = Counter()
        wrong: list[str] = []
        for name, expected, found in (*rest_cases(site, kinds), *grpc_cases(site, kinds), *crossed_cases(site, kinds)):
            area, _, case = name.partition(" ")
            cases[area] += 1
            if expected != found:
                wrong.append(f"{area} {case}: {found}, not {expected}")
    rounds = {"cases": dict(cases), "kinds_of_token": list(kinds), "wrong": wrong}
    total = cases.total()
    return [
        Target("11", f"of {total:,} cases, answered otherwise than specified", len(wrong), "0", not wrong),
    ], rounds


def headers_of(site: Site) -> dict[str, str]:
    """The value of the header Authorization, by what kind it is; "" for none. Those of a role have its name."""
    path = site.folder / tokens.FILE
    now = int(time.time())
    good, predict = site.tokens["admin"], site.tokens["predict"]
    # The server of `site` is up: what it must learn of goes through scripts/token.
    soon = site.command("token", "add", "old", "--role", "admin", "--expires-days", 1e-6).stdout.strip()
    gone = site.command("token", "add", "gone", "--role", "admin").stdout.strip()
    site.command("token", "revoke", "gone")
    if len({token.name for token in tokens.read(path)}) != len(tokens.ROLES) + 1 or not soon or not gone:
        raise RuntimeError("scripts/token did not make and revoke what this row needs")
    # A token counts for the whole second in which it expires.
    time.sleep(max(0.0, now + 2.5 - time.time()))
    keys = json.loads((site.folder / "key_file.json").read_text(encoding="utf-8"))
    bearers = {
        "expired": soon,
        "revoked": gone,
        "unknown id": f"marble_{'0' * 16}_{'A' * 43}",
        "another's secret": good[:24] + predict[24:],
        "last letter cut": good[:-1],
        "one letter more": good + "A",
        "case changed": good.swapcase(),
        "TorchServe's inference key": keys["inference"]["key"],
        "TorchServe's management key": keys["management"]["key"],
        "empty": "",
    }
    return {
        "none": "",
        **{kind: f"Bearer {value}" for kind, value in bearers.items()},
        "basic": f"Basic {good}",
        "no scheme": good,
        **{role: f"Bearer {site.tokens[role]}" for role in tokens.ROLES},
    }


def may(kind: str, role: str) -> bool:
    """Whether a kind of token may use what needs the role; "" is what needs none."""
    return role == "" or kind in (role, "admin")


class Rest:
    """A connection that sends paths as they are written, which other clients would tidy."""

    def __init__(self, site: Site, port: int) -> None:
        trusted = ssl.create_default_context(cafile=str(site.certificate))
        self._connection = http.client.HTTPSConnection("localhost", port, timeout=30, context=trusted)

    def ask(
        self, method: str, path: str, body: object, authorization: str, extra: Mapping[str, str] | None = None
    ) -> tuple[int, "http.client.HTTPMessage", bytes]:
        """Status, headers and body."""
        content = None if body is None else json.dumps(body).encode()
        headers = {**_JSON, **({"Authorization": authorization} if authorization else {}), **(extra or {})}
        try:
            self._connection.request(method, path, content, headers)
            answer = self._connection.getresponse()
            return answer.status, answer.headers, answer.read()
        except (http.client.HTTPException, OSError):
            # The door closes a connection after some refusals; the next request opens another.
            self._connection.close()
            self._connection.request(method, path, content, headers)
            answer = self._connection.getresponse()
            return answer.status, answer.headers, answer.read()


def said(route: Route, method: str, status: int, headers: "http.client.HTTPMessage", content: bytes) -> str:
    """An answer in the words of the specification: its status, and what is wrong with its form."""
    # What it says where it is asked, by those who may, with its own method.
    keys = route.keys if method == route.method and status == route.good else Route.keys
    if status >= 400 and method != "HEAD":
        try:
            value = json.loads(content)
            if value.keys() != keys or value["code"] != status:
                return f"{status} of another form: {content[:80]!r}"
        except (ValueError, AttributeError):
            return f"{status} with no JSON: {content[:80]!r}"
    if status == 401 and headers["WWW-Authenticate"] != "Bearer":
        return "401 without WWW-Authenticate"
    known = {"predict": b"positive", "explain": b'"attributions"'}.get(route.role, b"")
    if status == 200 and (known not in content or (route.role == "predict" and b'"attributions"' in content)):
        return f"200 with another answer: {content[:80]!r}"
    return str(status)


def rest_cases(site: Site, kinds: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(case, what must be, what is) of the REST port."""
    rest = Rest(site, site.rest)
    for route in SERVED:
        for kind, authorization in kinds.items():
            # A prediction with TorchServe's own orders in its headers is a prediction, and an explanation stays one.
            for method, extra in (*((method, {}) for method in METHODS), (route.method, _ORDERS)):
                expected = route.good
                if method != route.method:
                    expected = 405
                if not may(kind, route.role):
                    expected = 403 if kind in tokens.ROLES else 401
                answer = rest.ask(method, route.path, route.body, authorization, extra)
                found = said(route, method, *answer)
                yield f"REST {method} {route.path} {kind}{' +orders' if extra else ''}", str(expected), found
    for path in _PROBES:
        route = Route("GET", path, None, "")
        for kind, authorization in kinds.items():
            for method in METHODS:
                time.sleep(_SECONDS_BETWEEN_PROBES)
                expected = 200 if method in ("GET", "HEAD") else 405
                found = said(route, method, *rest.ask(method, path, None, authorization))
                yield f"REST {method} {path} {kind}", str(expected), found
    for path in NOT_SERVED:
        route = Route("", path, None, "")
        for kind, authorization in kinds.items():
            for method in METHODS:
                found = said(route, method, *rest.ask(method, path, None, authorization))
                yield f"REST {method} {path} {kind}", "400" if unreadable(path) else "404", found


def unreadable(path: str) -> bool:
    """Whether a path is none: it leaves the root, or has a NUL."""
    return path.endswith("%00") or path.startswith(("/../", "/%2e%2e/"))


def grpc_methods(file: FileDescriptor) -> list[str]:
    """All methods of a .proto file, as they are called."""
    services = file.services_by_name.values()
    return [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]


def grpc_cases(site: Site, kinds: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(case, what must be, what is) of the gRPC port: unary calls and streams."""
    request = open_inference_grpc_pb2.ModelInferRequest(model_name=MODEL)
    request.inputs.add(name="text", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a fine film")
    bodies = {PREDICTIONS: message(MODEL), MODEL_INFER: request.SerializeToString()}
    files = (inference_pb2, open_inference_grpc_pb2, management_pb2)
    methods = [method for file in files for method in grpc_methods(file.DESCRIPTOR)]
    assert bodies.keys() <= set(methods)
    with site.channel() as channel:
        for method in (*methods, *_FOREIGN):
            for kind, authorization in kinds.items():
                metadata = (("authorization", authorization),) if authorization else ()
                for streams in (False, True) if method not in bodies else (False,):
                    expected = "UNIMPLEMENTED"
                    if method in bodies:
                        expected = "OK"
                        if not may(kind, "predict"):
                            expected = "PERMISSION_DENIED" if kind in tokens.ROLES else "UNAUTHENTICATED"
                    content = bodies.get(method, bodies[PREDICTIONS])
                    found = call(channel, method, content, metadata, streams=streams)
                    yield f"gRPC {'stream' if streams else 'unary'} {method} {kind}", expected, found


def call(
    channel: grpc.Channel, method: str, content: bytes, metadata: tuple[tuple[str, str], ...], *, streams: bool = False
) -> str:
    """The status of a call; of a good one only if a label is in its answer."""
    try:
        if streams:
            answer = b"".join(channel.stream_stream(method, None, None)(iter([content]), metadata=metadata, timeout=30))
        else:
            answer = channel.unary_unary(method, None, None)(content, metadata=metadata, timeout=30)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK" if b"positive" in answer else f"OK with another answer: {answer[:80]!r}"


def crossed_cases(site: Site, kinds: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(case, what must be, what is): each port's routes asked of the other, and gRPC's asked otherwise than by gRPC."""
    rest = Rest(site, site.grpc)
    for route in (*SERVED, *(Route("GET", path, None, "") for path in _PROBES)):
        for kind, authorization in kinds.items():
            status, headers, _ = rest.ask(route.method, route.path, route.body, authorization)
            yield f"gRPC-port {route.method} {route.path} {kind}", "200 12", f"{status} {headers['grpc-status']}"
    for kind, authorization in kinds.items():
        for method in ("GET", "PUT", "POST"):
            # Not a POST: no such method. A POST of JSON: no such message.
            expected = "3" if method == "POST" else "12"
            if not may(kind, "predict"):
                expected = "7" if kind in tokens.ROLES else "16"
            status, headers, _ = rest.ask(method, PREDICTIONS, BODY, authorization)
            yield f"gRPC-port {method} {PREDICTIONS} {kind}", f"200 {expected}", f"{status} {headers['grpc-status']}"
