"""Commands that take turns: compiled side by side, timed alone."""

import os
import sys
from pathlib import Path
from threading import Thread

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from turns import Turns  # noqa: E402

SOON, LONG = 0.5, 30.0  # seconds


def test_one_is_timed_when_none_prepares_and_no_other_is_timed(tmp_path: Path) -> None:
    both = [Turns(tmp_path / "turns") for _ in range(2)]
    for one in both:
        one.prepare()
    threads = [Thread(target=one.time, daemon=True) for one in both]
    threads[0].start()
    threads[0].join(SOON)
    assert threads[0].is_alive()
    threads[1].start()
    for thread in threads:
        thread.join(SOON)
    (first,) = (at for at, thread in enumerate(threads) if not thread.is_alive())
    assert both[first].descriptor is not None
    os.close(both[first].descriptor)  # as the end of its process does
    threads[1 - first].join(LONG)
    assert not threads[1 - first].is_alive()


def test_without_a_file_nothing_waits() -> None:
    alone = Turns(None)
    alone.prepare()
    alone.time()
