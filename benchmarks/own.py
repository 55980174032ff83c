"""retrykit's ways to call, configured for the same work as the peers. Importing this needs retrykit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peers import ATTEMPTS, RETRIED, Function
from sampling import Call

from retrykit import (
    AsyncRetryTemplate,
    MapRetryContextCache,
    NoBackOffPolicy,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
    retryable,
)

POLICIES: dict[str, Any] = {
    "name": "benchmark",
    "retry_policy": SimpleRetryPolicy(max_attempts=ATTEMPTS, retry_for=RETRIED),
    "back_off_policy": NoBackOffPolicy(),
}
KEY = "message-1"


def template(**fields: Any) -> RetryTemplate:
    return RetryTemplate(context_cache=MapRetryContextCache(), **POLICIES, **fields)


def async_template(**fields: Any) -> AsyncRetryTemplate:
    return AsyncRetryTemplate(context_cache=MapRetryContextCache(), **POLICIES, **fields)


def decorated(body: Function) -> Call:
    return Call(expression="call(None)", names={"call": retryable(template=template())(body)})


def async_decorated(body: Function) -> Call:
    return Call(expression="call(None)", names={"call": retryable(template=async_template())(body)}, awaited=True)


def executed(body: Function) -> Call:
    return Call(expression="execute(body)", names={"execute": template().execute, "body": body})


def async_executed(body: Function) -> Call:
    return Call(expression="execute(body)", names={"execute": async_template().execute, "body": body}, awaited=True)


def state_per_call(redelivered: bool | None) -> Callable[[Function], Call]:
    return lambda body: _stateful(body, f"RetryState(key=key, redelivered={redelivered})", awaited=False)


def async_state_per_call(redelivered: bool | None) -> Callable[[Function], Call]:
    return lambda body: _stateful(body, f"RetryState(key=key, redelivered={redelivered})", awaited=True)


def state_prebuilt(body: Function) -> Call:
    return _stateful(body, "state", awaited=False)


def async_state_prebuilt(body: Function) -> Call:
    return _stateful(body, "state", awaited=True)


def _stateful(body: Function, state: str, *, awaited: bool) -> Call:
    return Call(
        expression=f"execute(body, state={state})",
        names={
            "execute": async_template().execute if awaited else template().execute,
            "body": body,
            "key": KEY,
            "state": RetryState(key=KEY, redelivered=False),
            "RetryState": RetryState,
        },
        awaited=awaited,
    )


def three_deliveries(body: Function) -> Call:
    """The same work spread over deliveries: the message comes, comes again, and succeeds the third time."""
    execute = template().execute

    def deliver(redelivered: bool) -> object:
        try:
            return execute(body, state=RetryState(key=KEY, redelivered=redelivered))
        except RETRIED:
            return None

    def deliveries(_argument: object) -> object:
        return deliver(False) or deliver(True) or deliver(True)

    return Call(expression="call(None)", names={"call": deliveries})


def async_three_deliveries(body: Function) -> Call:
    execute = async_template().execute

    async def deliver(redelivered: bool) -> object:
        try:
            return await execute(body, state=RetryState(key=KEY, redelivered=redelivered))
        except RETRIED:
            return None

    async def deliveries(_argument: object) -> object:
        return await deliver(False) or await deliver(True) or await deliver(True)

    return Call(expression="call(None)", names={"call": deliveries}, awaited=True)


def block(body: Function) -> Call:
    attempts = template().attempts

    def call(argument: object) -> object:
        for attempt in attempts():
            with attempt:
                return body(argument)
        raise AssertionError

    return Call(expression="call(None)", names={"call": call})


def async_block(body: Function) -> Call:
    attempts = async_template().attempts

    async def call(argument: object) -> object:
        async for attempt in attempts():
            async with attempt:
                return await body(argument)
        raise AssertionError

    return Call(expression="call(None)", names={"call": call}, awaited=True)
