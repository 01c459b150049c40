"""The engine's side of the pipe: starts a `SessionLLM` (or a bare ``vllm.LLM``) and does what it is asked."""

from __future__ import annotations

import operator
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from tests.engine.asking import Ask, Reply, Top
from tests.engine.engine import Setup
from tests.engine.inside import compiled_graphs, plant, pool_states, wrapped_layers
from tests.engine.inside import launches as launches_of
from tests.engine.stepping import IN_PROCESS, Aborted, Stepped

TOP = 20


class Served:
    """Answers calls by their name."""

    session_llm: Any = None
    llm: Any = None
    stepped: Stepped | None = None

    def start(self, setup: Setup, options: Mapping[str, Any], store: str) -> None:
        """Start the engine."""
        if setup.adapter is None:
            from vllm import LLM

            self.llm = LLM(str(setup.model), **options)
            return
        from deltamem_vllm.offline import SessionLLM

        os.environ.update(IN_PROCESS if setup.stepped else {})
        self.session_llm = SessionLLM(
            str(setup.model), adapter=str(setup.adapter), store=store, session_slots=setup.slots, **options
        )
        self.llm = self.session_llm.llm
        if setup.stepped:
            self.stepped = Stepped(self.session_llm)

    def run_in_step(self, asks: Sequence[Ask]) -> list[Reply]:
        """See `Engine.run_in_step`."""
        engine = self.llm.llm_engine
        step = engine.step

        def first_step() -> Any:
            engine.step = step
            self.llm.wake_up(["scheduling"])
            return step()

        self.llm.sleep(level=0, mode="keep")
        engine.step = first_step
        try:
            return self.run(asks)
        finally:
            engine.step = step

    def run(self, asks: Sequence[Ask]) -> list[Reply]:
        """Run a batch."""
        params = [_params(ask) for ask in asks]
        if self.stepped is not None:
            return [_reply(*self.stepped.turn(ask, p)) for ask, p in zip(asks, params, strict=True)]
        if self.session_llm is None:
            prompts = [{"prompt_token_ids": list(ask.ids)} for ask in asks]
            return [_reply(output, {}) for output in self.llm.generate(prompts, params, use_tqdm=False)]
        from deltamem_vllm.offline import Turn

        turns = [Turn(ask.ids, ask.session, ask.mode, p, ask.unwritten) for ask, p in zip(asks, params, strict=True)]
        return [_reply(answer.output, answer.outcome) for answer in self.session_llm.run(turns)]

    def abort(self, ask: Ask, after: int) -> Aborted:
        """See `Engine.abort`."""
        assert self.stepped is not None
        return self.stepped.abort(ask, _params(ask), after)

    def run_on(self, ask: Ask, kept: int | None) -> Reply:
        """See `Engine.run_on`."""
        assert self.stepped is not None
        return _reply(*self.stepped.run_on(ask, _params(ask), kept))

    def info(self, session: str) -> Any:
        """`SessionLLM.info`."""
        return self.session_llm.info(session)

    def delete(self, session: str) -> bool:
        """`SessionLLM.delete`."""
        return bool(self.session_llm.delete(session))

    def metric(self, name: str) -> float:
        """Sum of a counter over all labels."""
        return float(sum(m.value for m in self.llm.get_metrics() if m.name == name))

    def setting(self, path: str) -> Any:
        """See `Engine.setting`."""
        return operator.attrgetter(path)(self.llm.llm_engine.vllm_config)

    def imported(self, module: str) -> bool:
        """See `Engine.imported`."""
        return module in sys.modules

    def compiled_graphs(self) -> int:
        """See `Engine.compiled_graphs`."""
        return int(self.llm.collective_rpc(compiled_graphs)[0])

    def launches(self) -> dict[str, int]:
        """See `Engine.launches`."""
        return dict(self.llm.collective_rpc(launches_of)[0])

    def pool_states(self) -> list[bytes]:
        """See `Engine.pool_states`."""
        return list(self.llm.collective_rpc(pool_states)[0])

    def wrapped_layers(self) -> list[dict[str, dict[str, str]]]:
        """See `Engine.wrapped_layers`."""
        return list(self.llm.collective_rpc(wrapped_layers)[0])

    def plant(self, bug: str) -> None:
        """See `Engine.plant`."""
        if self.stepped is not None:
            self.stepped.plant(bug)
            return
        self.llm.collective_rpc(plant, args=(bug,))

    def stop(self) -> None:
        """Shut the engine down."""
        if self.session_llm is not None:
            self.session_llm.close()
        elif self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()


def _params(ask: Ask) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=ask.n,
        temperature=0.0,
        ignore_eos=True,
        logprobs=TOP,
        prompt_logprobs=TOP if ask.prompt_logprobs else None,
        detokenize=bool(ask.stop),
        stop=list(ask.stop),
    )


def _reply(output: Any, outcome: dict[str, Any]) -> Reply:
    made = output.outputs[0]
    return Reply(
        tokens=list(made.token_ids),
        logprobs=[_top(p) for p in made.logprobs or ()],
        prompt=[None if p is None else _top(p) for p in output.prompt_logprobs or ()],
        cached=output.num_cached_tokens or 0,
        text=made.text,
        outcome=outcome,
    )


def _top(position: Mapping[int, Any]) -> Top:
    return {int(token): float(value.logprob) for token, value in position.items()}


def main() -> None:
    """Answer until the other side closes the pipe."""
    number = int(sys.argv[1])
    os.set_inheritable(number, False)
    pipe = Connection(number)
    served = Served()
    try:
        while True:
            name, args = pipe.recv()
            try:
                answer = (True, getattr(served, name)(*args))
            except Exception as e:
                traceback.print_exc()
                answer = (False, f"{type(e).__name__}: {e}")
            sys.stderr.flush()
            pipe.send(answer)
    except (EOFError, OSError):
        served.stop()


if __name__ == "__main__":
    main()
