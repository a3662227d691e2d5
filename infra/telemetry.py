"""Instruments and how they are read: OpenTelemetry's SDK behind one small class, Prometheus' text format in front.

The only module that imports the SDK. Each `Telemetry` is a world of its own (no global provider, no global registry),
so that two coordinators of one process, as in tests, do not count into each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Histogram, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from infra.histogram import SECONDS
from infra.histogram import Histogram as Durations

#: What `expose` gives (Prometheus text format 0.0.4).
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Labels: TypeAlias = Mapping[str, str]
#: Gives the present values of one instrument, each with its labels.
Observe: TypeAlias = Callable[[], Iterable[tuple[float, Labels]]]

#: Endings that Prometheus' names have for a unit (UCUM, as OpenTelemetry names units).
_UNIT_ENDINGS: Final = {"": "", "s": "_seconds", "By": "_bytes"}


@dataclass(frozen=True)
class Metric:
    """Name and meaning of one instrument, which every user of it refers to."""

    #: Without the endings of unit and kind.
    name: str
    #: Counters only grow, gauges go up and down, histograms have buckets of seconds.
    kind: Literal["counter", "gauge", "histogram"]
    #: One sentence.
    meaning: str
    labels: tuple[str, ...] = ()
    #: "", "s" (seconds) or "By" (bytes).
    unit: Literal["", "s", "By"] = ""

    @property
    def exposed(self) -> str:
        """The name in Prometheus' text format, without the endings of a histogram's parts."""
        return self.name + _UNIT_ENDINGS[self.unit] + ("_total" if self.kind == "counter" else "")


class Telemetry:
    """One set of instruments. `close` it after the last reading."""

    def __init__(self, service: str, version: str) -> None:
        self._registry = CollectorRegistry()
        reader = PrometheusMetricReader(disable_target_info=False, scope_info_enabled=False, registry=self._registry)
        resource = Resource({SERVICE_NAME: service, SERVICE_VERSION: version})
        self._provider = MeterProvider(metric_readers=[reader], resource=resource, shutdown_on_exit=False)
        self._meter = self._provider.get_meter(service, version)

    def show(self, metric: Metric, observe: Observe) -> None:
        """Show a counter or a gauge with the values that `observe` returns at each reading."""
        create = (
            self._meter.create_observable_counter if metric.kind == "counter" else self._meter.create_observable_gauge
        )
        create(metric.name, [_observed(observe)], unit=metric.unit, description=metric.meaning)

    def histogram(self, metric: Metric, bounds: Sequence[float] = SECONDS) -> Histogram:
        """Return a histogram to record into; `bounds` are the upper ends of its buckets."""
        return self._meter.create_histogram(
            metric.name, unit=metric.unit, description=metric.meaning, explicit_bucket_boundaries_advisory=bounds
        )

    def show_durations(self, metric: Metric, histograms: Mapping[str, Durations]) -> None:
        """Show histograms that are counted elsewhere, by the value of the metric's only label."""
        self._registry.register(_DurationCollector(metric, histograms))

    def expose(self) -> bytes:
        """Return all instruments in Prometheus' text format; calls every `observe`."""
        return generate_latest(self._registry)

    def close(self) -> None:
        """Let go of the instruments."""
        self._provider.shutdown()


class _DurationCollector(Collector):
    """Reads plain histograms at each scrape."""

    def __init__(self, metric: Metric, histograms: Mapping[str, Durations]) -> None:
        self._metric = metric
        self._histograms = histograms

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Return one family with a series for each histogram."""
        family = HistogramMetricFamily(self._metric.exposed, self._metric.meaning, labels=self._metric.labels)
        for label, durations in self._histograms.items():
            family.add_metric([label], buckets=durations.up_to(), sum_value=durations.sum_s)
        return [family]


def _observed(observe: Observe) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def callback(_options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(value, labels) for value, labels in observe()]

    return callback
