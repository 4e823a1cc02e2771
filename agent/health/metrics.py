"""The host's figures in Prometheus' text format, by that project's own library.

Names and units follow its conventions (seconds, bytes, `_total`); labels have few values: states, outcomes, severities,
HTTP statuses, and the one model that answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

STATES = ("empty", "slot", "bridge", "dark")
SEVERITIES = ("info", "warning", "error", "critical")
_OUTCOMES = {
    "slot": "by_slot",
    "bridge": "by_bridge",
    "failed": "failed",
    "refused": "refused",
    "invalid": "invalid",
    "cancelled": "cancelled",
}


class Times(Protocol):
    """How long answers took."""

    sum: float

    def cumulative(self) -> Iterable[tuple[float, int]]:
        """(upper bound in seconds, how many took no longer)."""


def exposition(status: Mapping[str, Any], times: Times, statuses: Mapping[int, int]) -> str:
    """All figures at this moment. `status` is the document of `Host.status()`, `statuses` counts HTTP's answers."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Host(status, times, statuses))
    ProcessCollector(registry=registry)
    return generate_latest(registry).decode()


class _Host(Collector):
    def __init__(self, status: Mapping[str, Any], times: Times, statuses: Mapping[int, int]) -> None:
        self._status, self._times, self._statuses = status, times, statuses

    def collect(self) -> Iterator[Metric]:
        """Those that are known: a sensor that is not there has no figure."""
        status = self._status
        yield from self._state(status)
        yield from self._requests(status["serving"])
        slot = status["slot"]
        for name, key, text in (
            ("slotd_slot_temperature_celsius", "temperature_c", "The slot's temperature."),
            ("slotd_slot_power_watts", "power_w", "What the slot takes."),
        ):
            if slot.get(key) is not None:
                yield GaugeMetricFamily(name, text, value=slot[key])
        yield GaugeMetricFamily("slotd_slot_present", "Whether there is a slot.", value=float(bool(slot["present"])))
        proven = float(slot.get("proven") is not None)
        yield GaugeMetricFamily("slotd_slot_trusted", "Whether the slot has proven its model.", value=proven)
        link = status["link"]
        yield GaugeMetricFamily("slotd_link_connected", "Whether the broker is there.", value=float(link["connected"]))
        if (outbox := link.get("outbox")) is not None:
            yield GaugeMetricFamily("slotd_outbox_events", "Events that wait for the broker.", value=outbox["depth"])

    def _state(self, status: Mapping[str, Any]) -> Iterator[Metric]:
        info = GaugeMetricFamily("slotd_build_info", "The program.", labels=["version"])
        info.add_metric([status["version"]], 1)
        yield info
        yield GaugeMetricFamily("slotd_uptime_seconds", "Since the start.", value=status["uptime_s"])
        state = GaugeMetricFamily("slotd_host_state", "1 for the state that the host is in.", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(status["host"] == name))
        yield state
        model = GaugeMetricFamily("slotd_model_info", "The committed model.", labels=["model", "version", "digest"])
        if (committed := status["committed"]) is not None:
            model.add_metric([committed["name"], committed["version"], committed["digest"]], 1)
        yield model
        deploying = float(status["deployment"] is not None)
        yield GaugeMetricFamily("slotd_deployment_running", "Whether a model is being changed.", value=deploying)
        found = Counter(issue["severity"] for issue in status["issues"])
        issues = GaugeMetricFamily("slotd_issues", "What is wrong at the moment.", labels=["severity"])
        for severity in SEVERITIES:
            issues.add_metric([severity], found[severity])
        yield issues

    def _requests(self, serving: Mapping[str, Any]) -> Iterator[Metric]:
        requests = CounterMetricFamily("slotd_requests", "Requests that have ended.", labels=["outcome"])
        for outcome, key in _OUTCOMES.items():
            requests.add_metric([outcome], serving[key])
        yield requests
        yield CounterMetricFamily("slotd_hedged_requests", "Computed by the bridge as well.", value=serving["hedged"])
        yield CounterMetricFamily("slotd_retried_requests", "Run again: the executor died.", value=serving["retried"])
        yield GaugeMetricFamily("slotd_requests_in_flight", "In executors' hands.", value=serving["in_flight"])
        yield GaugeMetricFamily("slotd_requests_queued", "Waiting for an executor.", value=serving["queued"])
        times = HistogramMetricFamily("slotd_request_duration_seconds", "From a request's arrival to its answer.")
        buckets = [
            ("+Inf" if bound == float("inf") else str(bound), count) for bound, count in self._times.cumulative()
        ]
        times.add_metric([], buckets, self._times.sum)
        yield times
        answers = CounterMetricFamily("slotd_http_responses", "Answers over HTTP.", labels=["code"])
        for code, count in sorted(self._statuses.items()):
            answers.add_metric([str(code)], count)
        yield answers
