"""Whether the Hub can be reached, without hanging and without changing any setting."""

import functools
import threading
from collections.abc import Callable

from probing.utils.errors import UserError

PATIENCE = 10.0
"""Seconds that the Hub has to answer."""


def within(seconds: float, call: Callable[[], str]) -> str | None:
    """What a call returns, or None where it takes longer: looking up a name heeds no time limit of its own."""
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def ask_hub(seconds: float) -> str:
    """`answers`, or how the Hub fails to; waits that long for a connection, but as long as it takes for its name."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        status = get_session().head(constants.ENDPOINT, timeout=seconds).status_code
    except Exception as error:  # noqa: BLE001 - one of several HTTP libraries, by the version of huggingface_hub
        return f"cannot be reached ({type(error).__name__})"
    return "answers" if status < 500 else f"answers with status {status}"


@functools.cache
def require_hub() -> None:
    """Checks that the Hub answers, once; libraries would try again for minutes, for every file.

    Raises:
        UserError: it does not answer. The next call looks again.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    answer = within(PATIENCE, lambda: ask_hub(PATIENCE)) or f"does not answer within {PATIENCE:.0f} s"
    if answer != "answers":
        raise UserError(
            f"{constants.ENDPOINT} {answer}; check the network, or set HF_HUB_OFFLINE=1 to use downloaded models only"
        )
