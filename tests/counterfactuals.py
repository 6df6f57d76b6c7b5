"""Counterfactual pairs of random tokens, and the slow way to every effect: whole forwards with hooks."""

import torch

from hydrahead.convert.scoring.probes import Pair
from hydrahead.convert.scoring.readout import answer_positions, readout, readout_direction
from hydrahead.tests.families import HEADS, random_ids


def make_pair(seed: int = 0, answer_tokens: int = 3) -> Pair:
    """Two random texts that differ in three tokens, with an answer whose middle token both share."""
    clean, answer, wrong = (random_ids(1, n, seed + i)[0].tolist() for i, n in enumerate((24, answer_tokens, 3)))
    wrong = wrong[:answer_tokens]
    if answer_tokens > 2:
        wrong[1] = answer[1]
    corrupt = [*clean[:8], *((token + 7) % 90 + 3 for token in clean[8:11]), *clean[11:]]
    return Pair(clean + answer, corrupt + answer, len(clean), answer, wrong)


def null_pair(pair: Pair) -> Pair:
    """The pair with its clean text on both sides."""
    return Pair(pair.clean, pair.clean, pair.answer_start, pair.answer, pair.wrong)


@torch.no_grad()
def run(model, ids, patches=None, freeze=None):
    """
    A forward over all tokens.

    Args:
        patches: by layer, head outputs `[T, H, d]` and a mask `[T, H]` of where they replace the model's own.
        freeze: by layer, attention outputs `[1, T, D]` to use instead; not in layers with patches.

    Returns:
        head outputs `[L, T, H, d]`, attention outputs by layer, layer inputs by layer, final states `[T, D]`.
    """
    patches, freeze = patches or {}, freeze or {}
    heads, attention, inputs, hooks = [], [], [], []
    for index, layer in enumerate(model.model.layers):

        def before(_, args, index=index):
            states = args[0].unflatten(-1, (HEADS, -1)).clone()
            if index in patches:
                values, mask = patches[index]
                states[0] = torch.where(mask[..., None], values, states[0])
            heads.append(states[0])
            return (states.flatten(2),)

        def after(_, args, output, index=index):
            output = freeze[index] if index in freeze and index not in patches else output
            attention.append(output)
            return output

        projection = layer.self_attn.o_proj
        hooks += [
            layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
            projection.register_forward_pre_hook(before),
            projection.register_forward_hook(after),
        ]
    try:
        states = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(heads), attention, inputs, states


def measured(model, pair: Pair, states: torch.Tensor) -> float:
    """The readout of final states `[T, D]`."""
    with torch.no_grad():
        return float(readout(states[answer_positions(pair)], readout_direction(model, pair)))


@torch.no_grad()
def frozen_attention_drop(model, pair: Pair, layer: int, head: int) -> float:
    """A head's output taken from the corrupt text at the answer's positions, with later attention frozen."""
    _, clean_attention, _, clean_states = run(model, pair.clean)
    corrupt_heads, *_ = run(model, pair.corrupt)
    mask = torch.zeros(len(pair.clean), HEADS, dtype=torch.bool)
    mask[answer_positions(pair), head] = True
    later = {index: output for index, output in enumerate(clean_attention) if index > layer}
    *_, states = run(model, pair.clean, {layer: (corrupt_heads[layer], mask)}, later)
    return measured(model, pair, clean_states) - measured(model, pair, states)


@torch.no_grad()
def path_drop(model, pair: Pair, sender: tuple[int, int], hops: list[list[tuple[int, int]]]) -> float:
    """
    The sender's output taken from the corrupt text everywhere; each hop's heads recomputed in full by the model's own
    attention from what the one before wrote, all other attention frozen; the last hop's heads patched where the answer
    is predicted.
    """
    clean_heads, clean_attention, _, clean_states = run(model, pair.clean)
    corrupt_heads, *_ = run(model, pair.corrupt)
    frozen = dict(enumerate(clean_attention))
    everywhere = slice(0, len(pair.clean))

    def patch(heads, values, positions):
        found = {}
        for layer in {layer for layer, _ in heads}:
            mask = torch.zeros(len(pair.clean), HEADS, dtype=torch.bool)
            for other, head in heads:
                if other == layer:
                    mask[positions, head] = True
            found[layer] = (torch.where(mask[..., None], values[layer], clean_heads[layer]), torch.ones_like(mask))
        return found

    heads, values = [sender], corrupt_heads
    for index, hop in enumerate(hops):
        # Patched layers write what their heads give: the patched ones what is patched, the others what they did.
        _, _, inputs, _ = run(model, pair.clean, patch(heads, values, everywhere), frozen)
        recomputed = clean_heads.clone()
        for layer in {layer for layer, _ in hop}:
            recomputed[layer] = own_heads(model, layer, inputs[layer])
        heads, values = hop, recomputed
        positions = answer_positions(pair) if index == len(hops) - 1 else everywhere
    *_, states = run(model, pair.clean, patch(heads, values, positions), frozen)
    return measured(model, pair, clean_states) - measured(model, pair, states)


@torch.no_grad()
def own_heads(model, layer: int, states: torch.Tensor) -> torch.Tensor:
    """Head outputs `[T, H, d]` of the model's own attention in a layer that reads `states` `[1, T, D]`."""
    found = []
    block = model.model.layers[layer]
    hook = block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
    positions = torch.arange(states.shape[1]).unsqueeze(0)
    block.self_attn(
        hidden_states=block.input_layernorm(states),
        position_embeddings=model.model.rotary_emb(states, positions),
        attention_mask=None,
        position_ids=positions,
    )
    hook.remove()
    return found[0].unflatten(-1, (HEADS, -1))
