"""robots.txt, fetched under the same rules as everything else and asked before each hop."""

import threading
from urllib.parse import urlsplit, urlunsplit
from urllib.robotparser import RobotFileParser

from pipeline.fetch import Failure, Policy, fetch

_MAX_BYTES = 512_000  # RFC 9309 asks for 500 kibibytes at least
_AGENT = "uniclip"


class Robots:
    """Remembers each site's answer for as long as it lives. For many threads."""

    def __init__(self, policy: Policy):
        self._policy = Policy(policy.timeout, policy.deadline, _MAX_BYTES, policy.allow, policy.user_agent)
        self._sites: dict[str, RobotFileParser | Failure] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def judge(self, url: str) -> None:
        """Raises Failure where the site does not want us to fetch `url`, or cannot be asked (RFC 9309: then it may not)."""
        parts = urlsplit(url.strip())
        site = urlunsplit((parts.scheme, parts.netloc, "", "", ""))
        with self._lock:
            lock = self._locks.setdefault(site, threading.Lock())
        with lock:
            if site not in self._sites:
                self._sites[site] = self._ask(site)
        rules = self._sites[site]
        if isinstance(rules, Failure):
            raise rules
        if not rules.can_fetch(_AGENT, url):
            raise Failure("robots.txt")

    def _ask(self, site: str) -> RobotFileParser | Failure:
        rules = RobotFileParser()
        try:
            body = fetch(f"{site}/robots.txt", self._policy)
        except Failure as failure:
            if failure.reason.startswith("http 4") and not failure.passing:
                rules.parse([])  # no rules: everything may be fetched
                return rules
            if failure.reason in {"opted out", "too large"}:
                return Failure("robots.txt", failure.reason)
            return failure
        rules.parse(body.decode("utf-8", "replace").splitlines())
        return rules
