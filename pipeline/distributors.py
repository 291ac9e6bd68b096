"""Where the shards of a download are worked on: processes of this machine, a Ray cluster, a Spark cluster, or right here.

Each maps (function, tasks, how many at a time) to results as they are finished. img2dataset's own Ray and Spark drivers
are not used: its Ray one takes a failed shard for a finished one. On a cluster the output must be a place that every
machine sees: a shared folder or an fsspec URL.
"""

import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from pipeline.console import InputError, WorkFailed
from pipeline.processes import cores, in_processes

Task = TypeVar("Task")
Result = TypeVar("Result")
_REASON = re.compile(r"^\s*(?:[\w()=, .]*\.)?(\w*(?:Error|Failed|Exit): .+?)\s*$", re.MULTILINE)


def inline(function: Callable[[Task], Result], tasks: Iterable[Task], at_once: int | None = None) -> Iterator[Result]:
    """One after the other in this process: for a debugger, and for memory:// which other processes do not see."""
    return map(function, tasks)


def in_ray(function: Callable[[Task], Result], tasks: Iterable[Task], at_once: int | None = None) -> Iterator[Result]:
    """Through the cluster that RAY_ADDRESS or `ray start` names, otherwise one of this machine. Raises WorkFailed."""
    import ray
    from ray.exceptions import RayError

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)

    def work(task: Any) -> Any:
        return function(task)

    call: Any = ray.remote(max_retries=2)(work)
    ahead = iter(tasks)
    at_once = at_once or int(ray.cluster_resources().get("CPU", 1))
    try:
        waiting = [call.remote(task) for task in islice(ahead, 2 * at_once)]
        while waiting:
            done, waiting = ray.wait(waiting)
            waiting += [call.remote(task) for task in islice(ahead, len(done))]
            yield from ray.get(done)
    except RayError as error:
        raise WorkFailed(f"Ray: {_last_line(error)}: run the same command again to go on") from None
    finally:
        if ours:
            ray.shutdown()


def in_spark(function: Callable[[Task], Result], tasks: Iterable[Task], at_once: int | None = None) -> Iterator[Result]:
    """Through the cluster that spark-submit or spark-defaults.conf names, otherwise this machine. Raises WorkFailed."""
    from py4j.protocol import Py4JError
    from pyspark import SparkConf, SparkContext

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    conf = SparkConf().setAppName("uniclip-data download").set("spark.ui.showConsoleProgress", "false")
    conf.setIfMissing("spark.master", f"local[{at_once or cores()}]").setIfMissing("spark.log.level", "OFF")
    if str(conf.get("spark.master")).startswith("local"):
        conf.set("spark.ui.enabled", "false").setIfMissing("spark.driver.host", "127.0.0.1")
    context = SparkContext.getOrCreate(conf)
    try:
        ahead, width = iter(tasks), 4 * (at_once or context.defaultParallelism)
        while wave := list(islice(ahead, width)):
            yield from context.parallelize(wave, len(wave)).map(function).collect()
    except Py4JError as error:
        raise WorkFailed(f"Spark: {_last_line(error)}: run the same command again to go on") from None
    finally:
        context.stop()


def _last_line(error: Exception) -> str:
    """The innermost reason: the last line that Python's own tracebacks would end with."""
    found = _REASON.findall(str(error))
    return found[-1] if found else type(error).__name__


DISTRIBUTORS: dict[str, Callable[..., Iterator]] = {
    "processes": in_processes, "ray": in_ray, "spark": in_spark, "inline": inline}
_MODULES = {"ray": "ray", "spark": "pyspark"}


def distributor(name: str) -> Callable[..., Iterator]:
    """One of DISTRIBUTORS. Raises InputError for another name and where its library is not installed."""
    if name not in DISTRIBUTORS:
        raise InputError(f"--distributor {name!r} is none of {', '.join(DISTRIBUTORS)}")
    module = _MODULES.get(name)
    if module and importlib.util.find_spec(module) is None:
        raise InputError(f"--distributor {name} needs {module}, which is not installed: pip install 'uniclip[{name}]'")
    return DISTRIBUTORS[name]
