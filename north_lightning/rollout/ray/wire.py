"""Groups of rollouts as bytes (MessagePack), and back. Reading executes nothing: no pickle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from north_lightning.errors import InfrastructureError
from north_lightning.types import Message, Reward, Rollout, RolloutGroup, Turn

if TYPE_CHECKING:
    from numpy import ndarray


def pack(group: RolloutGroup) -> bytes:
    """``InfrastructureError`` for what has no place in MessagePack (an object among a reward's details)."""
    import msgspec

    try:
        return bytes(msgspec.msgpack.encode(group, enc_hook=_builtins))
    except (TypeError, ValueError, OverflowError) as error:
        raise InfrastructureError(f"group {group.group_id} cannot be sent: {error}") from error


def unpack(data: bytes) -> RolloutGroup:
    """``InfrastructureError`` for bytes that are no group."""
    import msgspec

    try:
        fields = msgspec.msgpack.decode(data)
        rollouts = [_rollout(row) for row in fields.pop("rollouts")]
        return RolloutGroup(**fields, rollouts=rollouts)
    except (msgspec.MsgspecError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise InfrastructureError(f"expected a group of rollouts, got {len(data)} other bytes: {error}") from error


def _rollout(row: dict[str, Any]) -> Rollout:
    from msgspec import convert

    row["turns"] = convert(row["turns"], list[Turn])
    row["messages"] = convert(row["messages"], list[Message])
    row["reward"] = convert(row["reward"], Reward | None)
    row["routed_experts"] = _array(row["routed_experts"])
    return Rollout(**row)


def _builtins(value: Any) -> Any:
    if type(value).__module__ == "numpy":
        if hasattr(value, "shape") and value.shape:
            return {"dtype": value.dtype.str, "shape": value.shape, "data": value.tobytes()}
        return value.item()
    raise TypeError(f"{type(value).__name__} is not plain data")


def _array(fields: dict[str, Any] | None) -> ndarray | None:
    import numpy

    if fields is None:
        return None
    return numpy.frombuffer(fields["data"], dtype=fields["dtype"]).reshape(fields["shape"])
