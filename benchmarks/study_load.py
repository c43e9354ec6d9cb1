"""Many respondents at once on the study's server, over loopback: is every vote that was answered there?

    python -m benchmarks.study_load STUDY

The server runs as people run it, with its rate limits, as a process of its own; each respondent has an
address of their own (127.0.x.y, as Linux allows) and goes through the whole study without a pause, unless
`--think` says so. When the last has handed in, the server is killed with SIGKILL and the rows are counted.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from attend_excite.study.create import Study, read_study
from attend_excite.study.database import votes


class Respondent:
    """A browser's part: pages and forms, and the seconds that each took."""

    def __init__(self, number: int, address: str, study: Study, think: float) -> None:
        transport = httpx.AsyncHTTPTransport(local_address=f"127.0.{1 + number // 250}.{1 + number % 250}")
        self.client = httpx.AsyncClient(base_url=address, transport=transport, timeout=120)
        self.study, self.think = study, think
        self.seconds: dict[str, list[float]] = {"page": [], "vote": []}
        self.saved: dict[str, str] = {}
        self.refused = 0

    async def answer_all(self) -> None:
        """Start, vote on every page, hand in."""
        async with self.client:
            home = await self._ask("page", "GET", "/")
            await self._ask("page", "POST", "/start", token=_token(home))
            for number, _ in enumerate(self.study.pages, 1):
                page = await self._ask("page", "GET", f"/page/{number}")
                await asyncio.sleep(self.think)
                choice = str(1 + number % len(self.study.systems))
                await self._ask("vote", "POST", f"/page/{number}", token=_token(page), choice=choice)
                self.saved[str(number)] = choice
            review = await self._ask("page", "GET", "/review")
            done = await self._ask("page", "POST", "/submit", token=_token(review))
            assert done.headers["location"] == "/done"

    async def _ask(self, what: str, method: str, path: str, **form: str) -> httpx.Response:
        while True:
            began = time.perf_counter()
            answer = await self.client.request(method, path, data=form or None)
            self.seconds[what].append(time.perf_counter() - began)
            if answer.status_code != 429:
                break
            self.refused += 1
            await asyncio.sleep(5)
        if answer.status_code not in (200, 303):
            raise RuntimeError(f"{method} {path} was answered with {answer.status_code}")
        return answer


def main() -> None:
    """Serve, vote, kill, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a study")
    parser.add_argument("--respondents", type=int, default=200, help="at once")
    parser.add_argument("--think", type=float, default=0.0, help="seconds that each takes for a page")
    parser.add_argument("--database", help="URL of an empty one; left out: SQLite in a temporary folder")
    options = parser.parse_args()
    study = read_study(options.study)
    with tempfile.TemporaryDirectory() as folder:
        url = options.database or f"sqlite:///{folder}/votes.sqlite"
        address, server = _serve(options.study, url)
        respondents = [
            Respondent(number, address, study, options.think) for number in range(options.respondents)
        ]
        began = time.perf_counter()

        async def everyone() -> None:
            await asyncio.gather(*(respondent.answer_all() for respondent in respondents))

        try:
            asyncio.run(everyone())
        finally:
            server.kill()
            server.wait()
        seconds = time.perf_counter() - began
        found = votes(url)
    answered = sum(len(respondent.saved) for respondent in respondents)
    chosen = Counter(str(1 + vote.shown.index(vote.choice)) for vote in found if vote.choice)
    sent = Counter(choice for respondent in respondents for choice in respondent.saved.values())
    table = Table("", "requests", "p50, ms", "p99, ms", "largest, ms")
    for what in ("page", "vote"):
        times = [1000 * value for respondent in respondents for value in respondent.seconds[what]]
        cuts = statistics.quantiles(times, n=100)
        table.add_row(what, str(len(times)), f"{cuts[49]:.0f}", f"{cuts[98]:.0f}", f"{max(times):.0f}")
    console = Console()
    console.print(table)
    console.print(
        f"{options.respondents} respondents, {answered} votes answered, {len(found)} rows, choices "
        f"{'the same' if chosen == sent else 'DIFFERENT'}, {seconds:.0f} s, "
        f"{answered / seconds:.0f} votes a second, "
        f"{sum(respondent.refused for respondent in respondents)} requests refused as too fast"
    )
    if len(found) != answered or chosen != sent:
        raise SystemExit("votes were lost")


def _serve(study: Path, url: str) -> tuple[str, subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("attend-excite")
    command = [program, "study", "serve", study, "--port", str(port), "--database", url]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    while server.poll() is None:
        try:
            httpx.get(address)
            return address, server
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def _token(answer: httpx.Response) -> str:
    return answer.text.split('name="token" value="')[1].split('"')[0]


if __name__ == "__main__":
    main()
