"""Answers of the reward service: results, and every refusal and failure with its type and status."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from training.reward_scoring import Outcome
from usp_env.errors import SpecError, require
from usp_env.rewards.wire import ERRORS, Failure

require("aiohttp", "service")
from aiohttp import web  # noqa: E402

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_log = logging.getLogger("usp_env.reward_service")
_STATUSES = {status: name for name, status in ERRORS.items() if status in (404, 405, 413)}


class Refusal(Exception):
    """A request that is not taken.

    Args:
        kind: One of `ERRORS`.
        message: What was expected, what came.
        after: When to try again, in seconds; None: never.
    """

    def __init__(self, kind: str, message: str, after: int | None = None) -> None:
        super().__init__(message)
        self.failure = Failure(kind, message)
        self.headers = {} if after is None else {"Retry-After": str(after)}


@web.middleware
async def typed_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong, as `{"error": {"type", "message"}}`."""
    try:
        return await handler(request)
    except SpecError as error:
        return answer(Failure("bad_request", str(error)))
    except Refusal as refusal:
        return answer(refusal.failure, refusal.headers)
    except web.HTTPException as error:
        allowed = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        return answer(_told(error, request), allowed, error.status)
    except web.RequestPayloadError:
        return answer(Failure("bad_request", "the body: expected what its headers say, got a broken one"))
    except Exception as error:
        _log.error("a handler raised %s", type(error).__name__)
        return answer(Failure("reward_failed", f"the service raised {type(error).__name__}"))


def _told(error: web.HTTPException, request: web.Request) -> Failure:
    kind = _STATUSES.get(error.status, "bad_request")
    if kind == "too_large":
        return Failure(kind, f"the body: expected at most {request.client_max_size} bytes, got more")
    wanted = "POST /reward or GET /health"
    return Failure(kind, f"expected {wanted}, got {request.method} {request.path:.100}")


def body_of(outcome: Outcome) -> dict[str, Any]:
    """An item's result or error in a batch.

    Example:
        >>> body_of(Failure("backend_failed", "HTTP 500"))
        {'error': {'type': 'backend_failed', 'message': 'HTTP 500'}}
    """
    return outcome.to_json() if isinstance(outcome, Failure) else outcome


def answer(outcome: Outcome, headers: dict[str, str] | None = None, status: int = 200) -> web.Response:
    """The response that is one outcome alone; an error has the status of its type, unless another is given."""
    if isinstance(outcome, Failure) and status == 200:
        status = ERRORS[outcome.type]
    return json_response(status, body_of(outcome), headers)


def json_response(status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> web.Response:
    """A response; what is no number raises rather than become one that no JSON reader knows."""
    return web.json_response(body, status=status, headers=headers, dumps=partial(json.dumps, allow_nan=False))
