"""What a conversation must leave: what another client has left, what one request leaves, what plain torch gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltamem_vllm.recall import ADAPTER_DIR, MODEL_DIR
from tests.engine.plain_model import PlainModel, States
from tests.server.conversations import Client, Left, Message, WrongMemory, prompt_ids
from tests.server.talk import distance
from tests.tolerances import ENGINE_LOGPROB, ENGINE_STATE, SAME_MEMORY


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference; infinite where one is not finite."""
    worst = float(np.abs(a - b).max())
    return worst if np.isfinite(worst) else float("inf")


def check_same(client: Client, other: Client) -> float:
    """Two conversations that keep the same texts: equal after every turn. Returns the worst difference of states."""
    assert client.left
    assert len(client.left) == len(other.left)
    worst = 0.0
    for turn, (a, b) in enumerate(zip(client.left, other.left, strict=True)):
        if a.answer.ids != b.answer.ids:
            raise WrongMemory(f"turn {turn}: {a.answer.text!r}, not {b.answer.text!r}")
        for what in ("tokens", "windows"):
            x, y = getattr(a.record, what), getattr(b.record, what)
            if x != y:
                raise WrongMemory(f"turn {turn}: {x} {what}, not {y}")
        far = max(apart(a.record.base, b.record.base), apart(a.record.end, b.record.end))
        if far > SAME_MEMORY:
            raise WrongMemory(f"turn {turn}: states differ by {far:.1e}")
        worst = max(worst, far)
        if (far := distance(a.answer.tops, b.answer.tops)) > SAME_MEMORY:
            raise WrongMemory(f"turn {turn}: log-probabilities differ by {far:.1e}")
    check_probe(client, other)
    return worst


def check_probe(client: Client, other: Client) -> None:
    """Both memories do the same to an unrelated prompt."""
    talk = client.served.talk
    if (far := distance(talk.probe(client.session), talk.probe(other.session))) > SAME_MEMORY:
        raise WrongMemory(f"log-probabilities of another prompt differ by {far:.1e}")


def check_once(client: Client) -> None:
    """The last request alone, in a session of its own: the conversation fed once."""
    once = Client(client.served)
    once.history = client.history[:-2]
    once.say(client.history[-2]["content"], max_tokens=len(client.left[-1].answer.ids))
    last, fresh = client.left[-1], once.left[-1]
    if last.answer.ids != fresh.answer.ids:
        raise WrongMemory(f"{last.answer.text!r}; of the conversation fed once it is {fresh.answer.text!r}")
    if (far := apart(last.record.end, fresh.record.end)) > SAME_MEMORY:
        raise WrongMemory(f"{far:.1e} from the state of the conversation fed once")
    if (last.record.tokens, last.record.windows) != (fresh.record.tokens, 1):
        raise WrongMemory(f"{last.record.tokens} tokens in {last.record.windows} windows, not {fresh.record.tokens}")
    check_probe(client, once)


class Reference:
    """The conversation in plain torch, which shares no code with the package: tokens, not caches or windows' plans."""

    def __init__(self) -> None:
        self._model = PlainModel(MODEL_DIR, ADAPTER_DIR)

    def turn(self, prompt: Sequence[Message], left: Left, states: States | None) -> tuple[States, float]:
        """Feed one window behind ``states``; returns those after it, and how far off the turn's record was.

        Raises:
            WrongMemory: states or log-probabilities.
        """
        ids = prompt_ids(prompt)
        rows, states = self._model.run([*ids, *left.answer.ids[:-1]], states)
        ended = np.stack([states[layer].numpy() for layer in sorted(states)])
        far = apart(ended, left.record.end)
        if far > ENGINE_STATE:
            raise WrongMemory(f"{far:.1e} from the reference's state")
        for token, top, row in zip(left.answer.ids, left.answer.tops, rows[len(ids) - 1 :], strict=True):
            off = max(abs(value - float(row[k])) for k, value in top.items())
            if off > ENGINE_LOGPROB or token != int(row.argmax()):
                raise WrongMemory(f"{off:.1e} from the reference's log-probabilities, token {token}")
        return states, far

    def check_new_turns(self, client: Client) -> float:
        """Window by window, each from the state before. Returns the worst difference of states."""
        states, worst = None, 0.0
        for turn, left in enumerate(client.left):
            states, far = self.turn([client.history[2 * turn]], left, states)
            worst = max(worst, far)
        return worst

    def check_resent(self, client: Client) -> float:
        """The whole conversation as one window from the empty memory."""
        return self.turn(client.history[:-1], client.left[-1], None)[1]
