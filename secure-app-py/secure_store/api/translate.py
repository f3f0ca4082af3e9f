"""The core's refusals as answers."""

from __future__ import annotations

from typing import Any

from secure_store.api.access import not_primary
from secure_store.api.errors import ApiError
from secure_store.api.keys import METRICS as METRICS
from secure_store.api.keys import PromotionRefused, Service
from secure_store.core import kv, plan
from secure_store.core.policy import PolicyError

RETRY = {"Retry-After": "1"}


def api_error(error: Exception, service: Service) -> Exception:
    """`error` as an ApiError, if it is one of the core's."""
    match error:
        case plan.OpFailed():
            return _op_failed(error)
        case plan.Rejected() if error.not_primary:
            return not_primary(service)
        case plan.Rejected():
            return ApiError(503, error.reason, headers=RETRY, definite=True)
        case plan.OutcomeUnknown():
            return ApiError(503, str(error), headers=RETRY, definite=False)
        case plan.KeyReused():
            return ApiError(422, "Idempotency-Key was used for another request")
        case plan.Full():
            return ApiError(507, str(error))
        case PolicyError():
            return ApiError(400, "Invalid field", detail=str(error))
        case kv.Damaged():
            return ApiError(500, "Stored data is damaged")
        case PromotionRefused():
            p = error.promotion
            return ApiError(
                409,
                p.reason,
                epoch=p.epoch,
                seq=p.last_seq,
                last_contact_ms_ago=p.last_contact_ms,
            )
        case _:
            return error


def _op_failed(error: plan.OpFailed) -> ApiError:
    index: dict[str, Any] = {"index": error.index} if error.numbered else {}
    if isinstance(error.cause, kv.Conflict):
        return ApiError(409, "Version mismatch", current_version=error.cause.current, **index)
    return ApiError(404, "Key not found", **index)
