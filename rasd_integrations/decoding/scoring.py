"""How likely given answers are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rasd_integrations.decoding.decoder import SpeculativeDecoder


@torch.inference_mode()
def scores(
    decoder: SpeculativeDecoder,
    prompt_ids: Sequence[int],
    answers: Sequence[Sequence[int]],
    namespace: str = "",
) -> list[float]:
    """Return each answer's mean log-probability a token behind the prompt, by the target at temperature 1.

    All answers are branches of one tree and run in one step (one each, where layers keep a recurrent state). An empty
    answer has minus infinity.

    Raises:
        PromptError: The prompt is empty or holds an unknown id.
        PromptTooLongError: Prompt and answers exceed the target's window.
        DeviceMemoryError: The step does not fit.
    """
    ids = list(prompt_ids)
    target = decoder.target
    target.check_prompt(ids, max(map(len, answers), default=0))
    tokens: list[int] = []
    parents: list[int] = []
    for answer in answers:
        parents += [-1, *range(len(tokens), len(tokens) + len(answer) - 1)][: len(answer)]
        tokens += answer
    lease = decoder.lease(ids, len(ids) + len(tokens), namespace)
    try:
        for _ in decoder.steps.prefill(ids, lease.buffer, first=False):
            pass
        lease.buffer.truncate(len(ids) - 1)
        behind = ids[lease.buffer.length : -1]  # of steps that keep whole pieces only
        for _ in target.prefill(behind, lease.buffer):
            pass
        if target.keeps_states:  # which no tree can run over
            chains = [target.step([ids[-1], *answer], lease.buffer)[:-1] for answer in answers]
            logits = torch.cat(chains)
        else:
            rows = torch.tensor([parent + 1 for parent in parents], dtype=torch.long)
            logits = target.step([ids[-1], *tokens], lease.buffer, parents)
            logits = logits[rows.to(logits.device)]
    finally:
        lease.release(ids[: decoder.steps.kept(len(ids) - 1)])
        target.leave()
    index = torch.tensor(tokens, dtype=torch.long, device=logits.device)[:, None]
    chosen = logits.float().log_softmax(-1).gather(1, index)[:, 0].tolist()
    out, start = [], 0
    for answer in answers:
        part = chosen[start : start + len(answer)]
        start += len(answer)
        out.append(sum(part) / len(part) if part else float("-inf"))
    return out
