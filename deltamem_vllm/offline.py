"""Sessions with an offline ``vllm.LLM``.

    from deltamem_vllm.offline import SessionLLM, Turn

    with SessionLLM("MODEL", adapter="ADAPTER_DIR", store="sqlite:////tmp/sessions.db") as llm:
        [answer] = llm.run([Turn("My cat is called Bo.", session="mia")])
        print(answer.text, answer.version)

A `Turn` without a session runs from the empty memory, one with ``mode="off"`` on the bare model.
"""

import contextlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deltamem_vllm.config import PLUGIN, resolve
from deltamem_vllm.plugin import allow_plugins, register, transfer_config
from deltamem_vllm.server.scope import Mode, check_id
from deltamem_vllm.server.tenants import DEFAULT_TENANT
from deltamem_vllm.sessions.control import BlockingControlClient
from deltamem_vllm.sessions.grants import EXTRA, fed_tokens
from deltamem_vllm.sessions.masks import normal


@dataclass(frozen=True)
class Turn:
    """One request.

    Attributes:
        prompt: text, token ids, or chat messages (rendered with the model's chat template).
        session: id; None for no session.
        mode: ``readwrite``, ``read`` or ``off``.
        sampling: a ``vllm.SamplingParams``; None for the engine's default.
        unwritten: spans (start, stop) of token positions, of the prompt or the reply behind it, that are read and not
            written to the session's memory.
    """

    prompt: str | Sequence[int] | Sequence[dict[str, str]]
    session: str | None = None
    mode: Mode = "readwrite"
    sampling: Any = None
    unwritten: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Answer:
    """What came of a turn: vLLM's own output, and what the session made of it."""

    output: Any
    outcome: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The generated text."""
        return str(self.output.outputs[0].text)

    @property
    def version(self) -> int | None:
        """The session's version after the turn; None without a session."""
        return self.outcome.get("version")


@dataclass(frozen=True)
class Admitted:
    """A turn as the engine takes it: prompt and ``SamplingParams``; its ticket, None where no session is written to."""

    prompt: dict[str, Any]
    sampling: Any
    ticket: str | None


class SessionLLM:
    """A ``vllm.LLM`` with sessions.

    Args:
        model: as for ``vllm.LLM``.
        adapter, store, session_slots, kernel: as the ``--deltamem-*`` flags.
        kwargs: passed to ``vllm.LLM``.

    Attributes:
        llm: the ``vllm.LLM``.
    """

    def __init__(
        self,
        model: str,
        *,
        adapter: str | None = None,
        store: str | None = None,
        session_slots: int | None = None,
        kernel: str | None = None,
        **kwargs: Any,
    ) -> None:
        from vllm import LLM

        given = {"adapter": adapter, "store": store, "session_slots": session_slots, "kernel": kernel}
        settings = resolve(given).with_control()
        allow_plugins([PLUGIN])
        register()
        kwargs["kv_transfer_config"] = transfer_config(settings, kwargs.get("kv_transfer_config"))
        self.llm = LLM(model, **kwargs)
        self._control = BlockingControlClient(settings.control_address(0))
        # An engine core in this process runs only while it is stepped.
        in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "0"
        self._meanwhile = self._step if in_process else None

    def run(self, turns: Sequence[Turn]) -> list[Answer]:
        """Run turns together in one batch; returns when every commit is durable.

        One session may appear once with ``readwrite``.

        Raises:
            CapacityError, SessionError: a turn was refused; none has run.
        """
        admitted: list[Admitted] = []
        try:
            for turn in turns:
                admitted.append(self.admit(turn))
            outputs = self._generate(admitted)
        except BaseException:
            for ticket in [a.ticket for a in admitted if a.ticket]:
                with contextlib.suppress(Exception):
                    self._control.ask("verdict", ticket=ticket, tokens=None)
            raise
        return [
            Answer(output, {} if a.ticket is None else self.outcome(a.ticket))
            for output, a in zip(outputs, admitted, strict=True)
        ]

    def _generate(self, admitted: Sequence[Admitted]) -> list[Any]:
        """``llm.generate``, with `settle` as soon as an answer is complete."""
        from vllm.sampling_params import RequestOutputKind

        engine: Any = self.llm.llm_engine
        waiting = {f"turn-{secrets.token_hex(8)}": each for each in admitted}
        done: dict[str, Any] = {}
        try:
            for name, each in waiting.items():
                each.sampling.output_kind = RequestOutputKind.FINAL_ONLY
                engine.add_request(name, each.prompt, each.sampling)
            while len(done) < len(waiting):
                for output in engine.step():
                    if output.finished and output.request_id in waiting:
                        done[output.request_id] = output
                        self.settle(waiting[output.request_id], output)
        except BaseException:
            engine.abort_request([name for name in waiting if name not in done])
            raise
        return [done[name] for name in waiting]

    def settle(self, admitted: Admitted, output: Any) -> None:
        """Say of an admitted turn, once, that vLLM's ``output`` of it is finished; for those who step the engine.

        Only the side of the engine that makes text of tokens knows where a stop string has ended an answer, so turns
        with such strings (``sampling.stop``) commit after this. Any other turn needs no word.
        """
        if admitted.ticket is not None and admitted.sampling.stop:
            answer = output.outputs[0]
            fed = fed_tokens(len(admitted.prompt["prompt_token_ids"]), len(answer.token_ids), answer.finish_reason)
            self._control.ask("verdict", ticket=admitted.ticket, tokens=fed)

    def admit(self, turn: Turn) -> Admitted:
        """Have a turn admitted to its session; for those who hand requests to ``llm.llm_engine`` themselves.

        Whoever does says with `settle` how a turn with stop strings has ended.

        Raises:
            CapacityError, SessionError: it was refused.
        """
        from vllm import SamplingParams

        sampling = (turn.sampling or SamplingParams()).clone()
        prompt: dict[str, Any] = {"prompt_token_ids": self._tokens(turn.prompt)}
        if turn.mode == "off":
            sampling.extra_args = {**(sampling.extra_args or {}), EXTRA: {"mode": "off"}}
            return Admitted({**prompt, "cache_salt": "deltamem-off:"}, sampling, None)
        if turn.session is None:
            return Admitted(prompt, sampling, None)
        ticket, spans = secrets.token_hex(16), normal(turn.unwritten)
        grant = self._control.ask(
            "admit",
            ticket=ticket,
            tenant=DEFAULT_TENANT,
            session=check_id(turn.session, "session"),
            mode=turn.mode,
            salt=None,
            tokens=np.asarray(prompt["prompt_token_ids"], np.int32).tobytes(),
            held=bool(sampling.stop),
            unwritten=spans,
            meanwhile=self._meanwhile,
        )
        sampling.extra_args = {**(sampling.extra_args or {}), EXTRA: {"ticket": ticket, "unwritten": spans}}
        return Admitted({**prompt, "cache_salt": grant["salt"]}, sampling, ticket)

    def outcome(self, ticket: str) -> dict[str, Any]:
        """What became of an admitted turn; waits until its commit is durable. With VLLM_ENABLE_V1_MULTIPROCESSING=0
        the engine must have finished its requests before.

        Raises:
            CapacityError: 503; it did not become durable in time.
        """
        return dict(self._control.ask("outcome", ticket=ticket, meanwhile=self._meanwhile))

    def info(self, session: str) -> dict[str, Any] | None:
        """What is known of a session, or None."""
        found: dict[str, Any] | None = self._control.ask("info", tenant=DEFAULT_TENANT, session=session)
        return found

    def delete(self, session: str) -> bool:
        """Erase a session; False if there was none."""
        existed = bool(self._control.ask("delete", tenant=DEFAULT_TENANT, session=session)["existed"])
        self.llm.llm_engine.is_sleeping()  # wakes an idle engine, so that its device forgets too
        if self._meanwhile is not None:
            self._meanwhile()
        return existed

    def close(self) -> None:
        """Stop the engine."""
        self._control.close()
        self.llm.llm_engine.engine_core.shutdown()

    def __enter__(self) -> "SessionLLM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _step(self) -> None:
        """What the busy loop of an engine core in a process of its own does between requests."""
        if not self.llm.llm_engine.has_unfinished_requests():  # their outputs are for who steps them
            self.llm.llm_engine.engine_core.get_output()

    def _tokens(self, prompt: Any) -> list[int]:
        if not isinstance(prompt, str) and not (prompt and isinstance(prompt[0], dict)):
            return [int(t) for t in prompt]
        tokenizer: Any = self.llm.get_tokenizer()
        if isinstance(prompt, str):
            return list(tokenizer.encode(prompt))
        rendered = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(rendered, add_special_tokens=False))
