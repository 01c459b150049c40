"""The compiled scan against the plain one, and the written-out backbone against Hugging Face."""

import torch

from deltamem_vllm.recall.backbone import Backbone, Size, hf_config
from deltamem_vllm.recall.data import Shape, dialogues
from deltamem_vllm.recall.memory import RANK, Memories
from deltamem_vllm.recall.scan import scan, scan_reference
from deltamem_vllm.recall.tokenizer import vocabulary
from deltamem_vllm.recall.windows import collate, lay_out

SMALL = Size(vocab=len(vocabulary()), hidden=64, inner=96, layers=2, heads=2, kv_heads=1)


def inputs(rows=3, length=17):
    torch.manual_seed(0)
    q, k, v, beta = torch.randn(4, rows, length, RANK).unbind()
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    return [q, k, v, beta.sigmoid()], torch.rand(rows, length) > 0.2, torch.randn(rows, RANK, RANK)


def test_scan_and_its_gradients_equal_the_reference():
    tensors, written, state = inputs()
    results = []
    for rule in (scan_reference, scan):
        leaves = [x.clone().requires_grad_() for x in (*tensors, state)]
        reads, last = rule(*leaves[:4], written, leaves[4])
        (reads.sin().sum() + last.cos().sum()).backward()
        results.append([reads, last, *(x.grad for x in leaves)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


def test_unwritten_tokens_leave_the_state_alone():
    tensors, written, state = inputs()
    reads, last = scan(*tensors, torch.zeros_like(written), state)
    assert torch.equal(last, state)
    assert not reads.any()


def test_split_scan_is_the_whole_scan():
    tensors, written, state = inputs()
    whole, last = scan(*tensors, written, state)
    first, middle = scan(*(x[:, :7] for x in tensors), written[:, :7], state)
    second, end = scan(*(x[:, 7:] for x in tensors), written[:, 7:], middle)
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(end, last)


def test_backbone_equals_hugging_face():
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(1)
    model = Backbone(SMALL)
    theirs = Qwen3ForCausalLM(hf_config(SMALL, eos=3, pad=1)).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.tie_weights()
    batch = collate([lay_out(next(dialogues(1, Shape(), "train")), "chat")])
    with torch.no_grad():
        ours = model.logits(model(batch.ids, batch.positions, batch.windows)[0])
        torch.testing.assert_close(ours, theirs(batch.ids).logits, rtol=1e-4, atol=1e-4)


def test_windows_in_one_row_equal_windows_served_one_by_one():
    torch.manual_seed(2)
    model, memories = Backbone(SMALL), Memories(SMALL, beta_bias=-1.0)
    batch = collate([lay_out(next(dialogues(2, Shape(), "train")), "turns")])
    with torch.no_grad():
        whole, last = model(batch.ids, batch.positions, batch.windows, memories)
        states, parts = None, []
        for number in range(int(batch.windows.max()) + 1):
            at = batch.windows[0] == number
            window = torch.zeros_like(batch.windows[:, at])
            part, states = model(batch.ids[:, at], batch.positions[:, at], window, memories, states)
            parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states, last, rtol=1e-4, atol=1e-5)
