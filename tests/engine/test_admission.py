"""The admission decision, from predictions alone."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.admission import Deadline, DeadlineEstimate, decide_admission
from serve_app.protocol.params import INITIAL, RequestContext

RETRY = RequestContext(is_retry=True)


def own(finish_s: float, deadline_s: float, solo_s: float = 1.0, waited_s: float = 0) -> Deadline:
    return Deadline(deadline_s, solo_s, DeadlineEstimate(finish_s, deadline_s - waited_s))


def test_a_full_backlog_rejects() -> None:
    assert decide_admission(30.0, 30.0, INITIAL) is None
    rejection = decide_admission(42.0, 30.0, INITIAL)
    assert rejection is not None
    assert (rejection.reason, rejection.excess_s) == ("backlog", 12.0)


def test_a_retry_may_use_the_reserve() -> None:
    assert decide_admission(59.0, 30.0, RETRY) is None
    assert decide_admission(61.0, 30.0, RETRY) is not None


def test_reserved_work_counts_as_queued() -> None:
    rejection = decide_admission(20.0, 30.0, RequestContext(reserved_s=11.0))
    assert rejection is not None
    assert rejection.excess_s == 0  # the queued work alone is not too much
    assert decide_admission(20.0, 30.0, RequestContext(reserved_s=10.0)) is None
    assert decide_admission(5.0, 30.0, RequestContext(reserved_s=3.0), own(8.0, 10.0)) is not None


def test_a_request_that_would_miss_its_deadline_is_rejected() -> None:
    assert decide_admission(5.0, 30.0, INITIAL, own(6.0, 6.0)) is None
    rejection = decide_admission(5.0, 30.0, INITIAL, own(6.0, 4.0))
    assert rejection is not None
    assert (rejection.reason, rejection.excess_s) == ("deadline", 2.0)
    # The time on its way does not count as excess: a retry has it again.
    rejection = decide_admission(5.0, 30.0, INITIAL, own(3.5, 4.0, waited_s=1.0))
    assert rejection is not None
    assert rejection.excess_s == 0


def test_a_request_that_would_make_another_one_late_is_rejected() -> None:
    delayed = [DeadlineEstimate(5.0, 9.0), DeadlineEstimate(8.0, 7.0)]
    rejection = decide_admission(5.0, 30.0, INITIAL, own(2.0, 3.0), delayed)
    assert rejection is not None
    assert rejection.excess_s == 1.0
    assert (
        decide_admission(5.0, 30.0, RETRY, own(2.0, 3.0), delayed) is None
    )  # a retry that redeems a reservation
    assert decide_admission(5.0, 30.0, RETRY, own(6.0, 3.0)) is None
    assert decide_admission(61.0, 30.0, RETRY, own(6.0, 3.0)) is not None


def test_each_rejection_has_its_cause() -> None:
    def cause(
        queued_work_s: float, reserved_s: float, own: Deadline, *delayed: DeadlineEstimate
    ) -> str:
        rejection = decide_admission(
            queued_work_s, 30.0, RequestContext(reserved_s=reserved_s), own, delayed
        )
        assert rejection is not None
        return rejection.cause

    assert cause(5.0, 0.0, own(6.0, 4.0)) == "late"
    assert cause(5.0, 3.0, own(8.0, 10.0)) == "reserved"
    assert cause(5.0, 0.0, own(2.0, 3.0), DeadlineEstimate(8.0, 7.0)) == "delay"
    assert cause(31.0, 0.0, own(60.0, 10.0)) == "backlog"


def test_siblings_that_cannot_be_on_time_together_are_rejected_on_an_idle_engine() -> None:
    rejection = decide_admission(0.0, 30.0, INITIAL, own(3.0, 2.0), has_siblings=True)
    assert rejection is not None
    assert (rejection.reason, rejection.cause, rejection.excess_s) == ("deadline", "siblings", 1.0)
    rejection = decide_admission(0.5, 30.0, INITIAL, own(3.5, 2.0), has_siblings=True)
    assert rejection is not None
    assert rejection.cause == "siblings"  # it would be late without the other work too
    rejection = decide_admission(1.5, 30.0, INITIAL, own(3.0, 2.0), has_siblings=True)
    assert rejection is not None
    assert rejection.cause == "late"
    # Nor if its siblings would be late.
    assert (
        decide_admission(
            0.0, 30.0, INITIAL, own(1.0, 2.0), [DeadlineEstimate(3.0, 2.0)], has_siblings=True
        )
        is not None
    )
    assert (
        decide_admission(
            0.0, 30.0, INITIAL, own(2.0, 2.0), [DeadlineEstimate(2.0, 2.0)], has_siblings=True
        )
        is None
    )
    assert (
        decide_admission(
            0.0, 30.0, RequestContext(reserved_s=9.0), own(2.0, 2.0), has_siblings=True
        )
        is None
    )
    assert decide_admission(0.0, 30.0, INITIAL, has_siblings=True) is None  # it names no deadline
    assert decide_admission(0.0, 30.0, RETRY, own(3.0, 2.0), has_siblings=True) is None


@given(
    reserved_s=st.floats(0, 1e3),
    is_retry=st.booleans(),
    solo_s=st.floats(0.01, 10),
    finish_s=st.floats(0, 100),
)
def test_an_idle_engine_rejects_no_feasible_request(
    reserved_s: float, is_retry: bool, solo_s: float, finish_s: float
) -> None:
    context = RequestContext(is_retry=is_retry, reserved_s=reserved_s)
    wanted = Deadline(solo_s, solo_s, DeadlineEstimate(finish_s, solo_s))
    assert decide_admission(0.0, 30.0, context) is None
    assert decide_admission(0.0, 30.0, context, wanted) is None
    late = replace(
        wanted, estimate=DeadlineEstimate(finish_s, solo_s / 3)
    )  # too late already when it came
    assert decide_admission(0.0, 30.0, context, late) is not None


@given(
    queued_work_s=st.floats(0.1, 100),
    limit_s=st.floats(0.1, 100),
    finish_s=st.floats(0.1, 100),
    deadline_s=st.none() | st.floats(1, 100),
)
def test_a_request_would_be_admitted_after_its_excess(
    queued_work_s: float, limit_s: float, finish_s: float, deadline_s: float | None
) -> None:
    """If no other request comes, each second removes a second of work."""

    def wanted(passed_s: float) -> Deadline | None:
        return None if deadline_s is None else own(max(1.0, finish_s - passed_s), deadline_s)

    rejection = decide_admission(queued_work_s, limit_s, INITIAL, wanted(0.0))
    if rejection is None:
        return
    passed_s = rejection.excess_s + 1e-6
    left_s = max(0.0, queued_work_s - passed_s)
    assert decide_admission(left_s, limit_s, RETRY, wanted(passed_s)) is None
