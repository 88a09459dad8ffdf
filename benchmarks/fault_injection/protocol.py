"""Row 9: what is wrong with a protocol rather than with a request."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

from benchmarks.fault_injection import smuggling
from benchmarks.fault_injection.bench import MODEL, Bench, Target
from benchmarks.fault_injection.floods import Attacker, Door, continuation, rapid_reset, ready, slow, trickle
from benchmarks.fault_injection.load import Load, Outcome, percentile, statuses
from benchmarks.fault_injection.site import BODY, Site
from server import tokens

# What front.properties has for every client, this row's, too.
_LIMITS = {"client_rate": 1000, "client_burst": 500, "client_in_flight": 96}
# No target: TorchServe goes on with what was reset, so a client that may ask has its share of the model's time, as it
# would have without a reset; its limits are client_rate and client_in_flight.
_ALLOWED_WORK = "rapid reset with a token"
_SLOW_SECONDS, _TIMES_SLOWER = 10, 2


def protocol(bench: Bench) -> tuple[list[Target], Any]:
    """Row 9: smuggled requests, floods of HTTP/2, slow clients."""
    # Of TorchServe's requests, the canary would be taken for a hidden one, if it asked now.
    with bench.site("smuggling", canary_every_seconds=600) as site:
        cases, probes_wrong = _smuggle(site)
    desyncs = [case["case"] for case in cases if case["desync"]]
    targets = [
        Target("9a", f"desyncs of {len(cases)} smuggling cases", len(desyncs), "0", not desyncs),
        Target("9b", "next requests of others answered wrongly", probes_wrong, "0", probes_wrong == 0),
    ]
    site = bench.site("floods", (MODEL,), **_LIMITS)
    attacker, other = (tokens.add(name, ["predict", "metrics"], None, site.folder / tokens.FILE) for name in ("a", "b"))
    with site, Attacker() as process:
        nobody, client = (Door(site.rest, site.grpc, site.certificate, token, other) for token in ("", attacker))
        seconds = bench.times(30, 6)
        floods: dict[str, tuple[Callable[..., Any], Door, float]] = {
            # These first: floods make long logs, and when a log begins anew nginx ends idle connections.
            "slow clients": (slow, client, bench.times(500, 60)),
            "rapid reset": (rapid_reset, nobody, seconds),
            _ALLOWED_WORK: (rapid_reset, client, seconds),
            "CONTINUATION": (continuation, nobody, seconds),
        }
        process.start(ready).result()
        figures = {}
        for name, (attack, door, much) in floods.items():
            before = _user(site, lambda: time.sleep(seconds))
            started: list[Any] = []
            during = _user(site, lambda: started.append(process.start(attack, door, much).result()))  # noqa: B023
            figures[name] = {
                "what": started[0],
                "user_before": _figures(before),
                "user_during": _figures(during),
            }
        trickled: list[Any] = []
        meanwhile = _user(
            site, lambda: trickled.append(process.start(trickle, client, 20, bench.times(30, 8)).result())
        )
    for name, found in figures.items():
        ratio = round(found["user_during"]["p99_s"] / found["user_before"]["p99_s"], 2)
        found["p99_ratio"] = ratio
        what = f"a user's p99 during {name}, of that before"
        if name == _ALLOWED_WORK:
            continue
        targets.append(Target("9c", what, ratio, f"<= {_TIMES_SLOWER}", ratio <= _TIMES_SLOWER))
    for name in ("rapid reset", _ALLOWED_WORK, "CONTINUATION"):
        rounds = figures[name]["what"]
        left = sum(not entry["ended"] for entry in rounds)
        targets.append(Target("9d", f"connections of {len(rounds)} not ended: {name}", left, "0", left == 0))
        figures[name]["what"] = _short(rounds)
    closed = figures["slow clients"]["what"]
    longest = max((seconds is None, seconds or 0) for _, seconds in closed)
    worst = "never" if longest[0] else longest[1]
    met = not longest[0] and longest[1] <= _SLOW_SECONDS
    targets.append(Target("9e", f"{len(closed)} slow clients, the last one closed after, s", worst, "<= 10", met))
    figures["slow clients"]["what"] = {
        kind: _spread([seconds for other, seconds in closed if other == kind]) for kind, _ in closed
    }
    return targets, {
        "smuggling": cases,
        "floods": figures,
        # Not a target: what nginx does not bound is the time of a body that never falls silent.
        "body_by_drops": {**trickled[0], "user": _figures(meanwhile)},
    }


# --- Smuggling


def _smuggle(site: Site) -> tuple[list[dict[str, Any]], int]:
    """Each case with what was answered, and how many requests of others were answered wrongly after one."""
    key = json.loads((site.folder / "key_file.json").read_text(encoding="utf-8"))["inference"]["key"]
    body = json.dumps(BODY).encode()
    session = site.session()
    known = site.predict(session).json()
    _proof(site, key)
    cases: list[dict[str, Any]] = []
    wrong = 0
    hidden_before = _hidden_requests(site)
    for number, (name, http1) in enumerate(smuggling.HTTP1.items()):
        hidden = smuggling.Hidden(number, site.tokens["predict"].encode(), key.encode(), body)
        answers = smuggling.send_http1(site.rest, site.certificate, http1(hidden) + hidden.marked)
        heard = [answer for answer in answers if not answer.startswith(b"HTTP/1.1 1")]
        marked = [answer for answer in heard if b"marked-%d" % number in answer]
        desync = any(b"hidden-%d" % number in answer for answer in heard) or len(heard) > 2 or len(marked) > 1
        desync |= any(_body(answer) != known for answer in marked)
        cases.append({"case": name, "answers": [answer[9:12].decode() for answer in heard], "desync": desync})
    for port, table in ((site.rest, smuggling.HTTP2), (site.grpc, smuggling.GRPC)):
        for number, (name, http2_case) in enumerate(table.items(), len(cases)):
            hidden = smuggling.Hidden(number, site.tokens["predict"].encode(), key.encode(), body)
            told, contents = smuggling.send_http2(port, site.certificate, hidden, *http2_case(hidden))
            # gRPC's port has no REST: its marked request is one that is not served.
            marked_wrong = port == site.rest and told.get(3) == "200" and json.loads(contents[3]) != known
            desync = not told.keys() <= {0, 1, 3} or marked_wrong
            said = [f"{stream}: {told[stream]}" for stream in sorted(told)]
            cases.append({"case": name, "answers": said, "desync": desync})
    # A connection between nginx and TorchServe that had a hidden answer on it would give it to somebody else.
    for _ in range(300):
        wrong += site.predict(session).json() != known
    hidden_after = _hidden_requests(site)
    if hidden_after != hidden_before:
        cases.append(
            {"case": "requests that TorchServe saw and nobody sent", "answers": [hidden_after], "desync": True}
        )
    return cases, wrong


def _body(answer: bytes) -> Any:
    """The JSON in an answer."""
    content = answer.partition(b"\r\n\r\n")[2]
    found = re.search(rb"[\[{].*[\]}]", content, re.DOTALL)
    try:
        return json.loads(found[0]) if found else None
    except ValueError:
        return None


def _hidden_requests(site: Site) -> float:
    """How many requests TorchServe has had that name a version, which only hidden ones do."""
    text = site.session("metrics").get(f"{site.url}/metrics", timeout=10).text
    lines = re.findall(r"(?m)^ts_inference_requests_total\{(.*)\} ([0-9.e+]+)$", text)
    return sum(float(value) for labels, value in lines if f'model_version="{smuggling.VERSION}"' in labels)


def _proof(site: Site, key: str) -> None:
    """Asks TorchServe itself for what is hidden: the count must tell. Raises SiteError if it does not."""
    before = _hidden_requests(site)
    address = re.search(
        r"(?m)^inference_address=(.*)$", (site.folder / "config.properties").read_text(encoding="utf-8")
    )
    assert address is not None
    with site.session("") as session:
        url = f"{address[1]}/predictions/{MODEL}/{smuggling.VERSION}"
        session.post(url, json=BODY, headers={"Authorization": f"Bearer {key}"}, timeout=10).raise_for_status()
    site.wait_until(lambda: _hidden_requests(site) == before + 1, 10)


# --- Floods


def _user(site: Site, meanwhile: Callable[[], None]) -> list[Outcome]:
    """An ordinary user's requests, one after another, until `meanwhile` returns."""
    with Load(site, MODEL, rest=1) as load:
        meanwhile()
    return load.outcomes


def _figures(outcomes: list[Outcome]) -> dict[str, Any]:
    seconds = [outcome.seconds for outcome in outcomes]
    return {
        "requests": len(seconds),
        "p50_s": percentile(seconds, 50),
        "p99_s": percentile(seconds, 99),
        "statuses": statuses(outcomes),
    }


def _short(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """A summary of many connections."""
    kinds = sorted({entry.get("kind", "") for entry in rounds})
    found = {}
    for kind in kinds:
        of_kind = [entry for entry in rounds if entry.get("kind", "") == kind]
        found[kind or "all"] = {
            "connections": len(of_kind),
            "ended": {how: sum(entry["ended"] == how for entry in of_kind) for how in ("GOAWAY", "closed", "")},
            "seconds": _spread([entry["seconds"] for entry in of_kind]),
            "sent": _spread([entry.get("streams", entry.get("bytes")) for entry in of_kind]),
        }
    return found


def _spread(values: list[Any]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    return {
        "count": len(values),
        "never": len(values) - len(known),
        "least": min(known, default=None),
        "most": max(known, default=None),
    }
