"""Two ranks of a job over a real TCP store in one process: rank 0 names the one that failed or is missing."""

import socket
import threading
from collections.abc import Iterator

import pytest

from megatron_sfr.doctor import job_ranks
from megatron_sfr.doctor.job_ranks import Job, Place, StepFailed


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Job, Job]]:
    monkeypatch.setattr(job_ranks, "SILENT_S", 1.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = tuple(Job(Place(rank, 2, 0, host, "127.0.0.1", port, rank == 0), 20.0) for rank, host in enumerate("ab"))
    yield both
    for job in both:
        job._ending.set()
        job._heart.join()


def test_values_go_to_rank_0_and_back(jobs: tuple[Job, Job]) -> None:
    first, second = jobs
    with second.step("one"), first.step("one"):
        assert second.gather({"x": 1}) == []
        assert first.gather(None) == [None, {"x": 1}]
        first.share([3])
        assert second.share() == [3]
    ending = threading.Thread(target=second.end)
    ending.start()
    assert first.end(2) == 2
    ending.join()


def test_a_rank_that_fails_is_named_with_its_reason_and_reports_nothing_itself(
    jobs: tuple[Job, Job], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = jobs
    with pytest.raises(StepFailed, match="the folder: disk is full") as failed, second.step("the folder"):
        raise OSError("disk is full")
    codes: list[int] = []
    ending = threading.Thread(target=lambda: codes.append(second.end_failed(str(failed.value))))
    ending.start()
    reason = r"^the folder: b \(rank 1\) failed: the folder: disk is full$"
    with pytest.raises(StepFailed, match=reason) as seen, first.step("the folder"):
        first.gather(1)
    assert first.end_failed(str(seen.value)) == 2
    ending.join()
    assert codes == [2]
    printed = capsys.readouterr()
    assert printed.out == f"problem  {seen.value}\n"
    assert printed.err == ""


def test_a_rank_that_stayed_behind_a_silent_one_and_an_address_are_named(jobs: tuple[Job, Job]) -> None:
    first, second = jobs
    first.addresses = {"10.0.0.2": "b", "10.0.0.21": "c"}
    with second.step("one"), first.step("one"):
        pass

    def fail(step: str, reason: str) -> str:
        with pytest.raises(StepFailed) as failed, first.step(step):
            raise RuntimeError(reason)
        return str(failed.value)

    assert fail("two", "Timed out").startswith("two: b (rank 1) did not get there")
    with second.step("two"), second.step("three"), second.step("four"), second.step("five"):
        assert "three: the connection to c failed" in fail("three", "Connection closed by peer [10.0.0.21]:4242")
        assert "four: all hosts answer, but not through the process group" in fail("four", "Timed out")
        second._ending.set()
        second._heart.join()
        assert fail("five", "Timed out").startswith("five: b (rank 1) no longer answers")
